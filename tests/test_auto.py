"""`AutoModelForCausalLM.from_pretrained` on our checkpoints and on others, with `offload` imported and without."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TELL = """
import torch
from transformers import AutoModelForCausalLM
def tell(model):
    with torch.inference_mode():
        logits = model(torch.arange(20)[None]).logits.float()
    return [type(model).__name__, type(model.model.layers[0].mlp.up_proj).__name__, logits.flatten().tolist()]
"""


def run(code: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=200
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_loads_nothing_heavy() -> None:
    run(
        "import sys, offload\n"
        "heavy = {'torch', 'transformers', 'numpy'} & {name.partition('.')[0] for name in sys.modules}\n"
        "assert not heavy, heavy"
    )


def test_our_checkpoints_stream_and_others_load_as_before(tiny_checkpoint: Path, tiny_model: Path) -> None:
    """In one process each: the package first, transformers first, and the stock library alone."""
    ours = f"""
streamed = AutoModelForCausalLM.from_pretrained({str(tiny_checkpoint)!r}, device_map="disk", dtype="bfloat16")
kept = AutoModelForCausalLM.from_pretrained({str(tiny_checkpoint)!r}, max_memory={{"cpu": "8GiB"}})
other = AutoModelForCausalLM.from_pretrained({str(tiny_model)!r}, dtype="bfloat16")
from offload.executor import executor_of
assert executor_of(streamed).placement.tiers == ("disk",) * 3, executor_of(streamed).placement.tiers
assert executor_of(kept).placement.tiers == ("host",) * 3
assert not hasattr(other, "_streaming")
a, b = tell(streamed), tell(kept)
assert a == b
assert tell(other)[:2] == ["LlamaForCausalLM", "Linear"]
print(a)
"""
    first = eval(run("import offload\n" + TELL + ours))
    second = eval(run("from transformers import AutoModelForCausalLM\nimport offload, offload.auto\n"
                      "offload.auto.register()\n" + TELL + ours))  # fmt: skip
    assert first == second
    assert first[:2] == ["LlamaForCausalLM", "PackedLinear"]
    stock_code = f"print(tell(AutoModelForCausalLM.from_pretrained({str(tiny_checkpoint)!r}, dtype='bfloat16')))"
    stock = eval(run(TELL + stock_code).strip().splitlines()[-1])
    assert stock[0] == "LlamaForCausalLM"
    assert stock[1] != "PackedLinear"
    distance = sum((x - y) ** 2 for x, y in zip(first[2], stock[2], strict=True)) ** 0.5
    assert distance < 0.05 * sum(y**2 for y in stock[2]) ** 0.5  # activations of eight bits against bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attn_implementation": "eager"}, "attn_implementation cannot be had of a streamed model; leave it out"),
        ({"dtype": "int8"}, "dtype torch.int8: expected 'auto' or a floating dtype of torch"),
        ({"dtype": "nothing"}, "dtype 'nothing': expected 'auto' or a floating dtype of torch"),
        ({"device_map": {"nowhere": "cpu"}}, "--device-map: no module 'nowhere' in this model"),
    ],
)
def test_what_cannot_be_honoured_is_refused(tiny_checkpoint: Path, options: dict[str, object], message: str) -> None:
    from transformers import AutoModelForCausalLM

    from offload.errors import UsageError

    with pytest.raises(UsageError) as refused:
        AutoModelForCausalLM.from_pretrained(str(tiny_checkpoint), **options)
    assert message in str(refused.value)
