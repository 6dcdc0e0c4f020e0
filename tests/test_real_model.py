"""The promises on the embedded model: accuracy kept, the budget kept, and the file opened by others."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize as dequantize_gguf
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from eval.likelihood import Protocol, measure
from kernels.packed import PackedWeight, dequantize
from offload.checkpoint import Checkpoint
from offload.command import parse_bytes
from offload.executor import executor_of, load
from offload.source import _embedded_gguf, resolve_model
from offload.text import load_text, tokenize
from tests.test_preflight import TWICE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

ROOT = Path(__file__).parent.parent
FEW = ("--num-samples", "32", "--seq-len", "128")
"""An eighth of the tokens that are the default: what is promised here holds on these, too, and is not held less."""

QUANTIZATIONS = {"rtn": ("--cpu-memory", "540MiB"), "awq": ("--cpu-memory", "700MiB", *FEW, "--set", "scale_points=8")}


def run(module: str, *flags: str) -> dict[str, Any]:
    """Run a command in a process of its own, and return the JSON object it prints."""
    command = [sys.executable, "-m", module, *flags, "--json"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    values: dict[str, Any] = json.loads(result.stdout)
    return values


@contextmanager
def memory_limited_group() -> Iterator[tuple[Callable[[], None], Path] | None]:
    """Yield what puts the calling process into a control group, and the file that tells the kernel its limit.

    None where this process may not make one; the peak that the command reports of itself is asserted all the same.
    """
    group = Path("/sys/fs/cgroup/memory") / f"int4-offload-{os.getpid()}"
    limit = "memory.limit_in_bytes"
    if not group.parent.is_dir():
        group, limit = Path("/sys/fs/cgroup") / group.name, "memory.max"
    try:
        group.mkdir()
        (group / limit).write_text(str(1 << 30))
    except OSError:
        yield None
        return

    def join() -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))

    try:
        yield join, group / limit
    finally:
        group.rmdir()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What `quant.rtn` and `quant.awq` make of the embedded model, each within a budget for the whole process."""
    base = tmp_path_factory.mktemp("checkpoints")
    for method, flags in QUANTIZATIONS.items():
        result = run(f"quant.{method}", "--output", str(base / method), *flags)
        assert result["peak_memory_bytes"] <= parse_bytes(flags[1], flags[0])
    return {method: base / method for method in QUANTIZATIONS}


def test_awq_loses_at_most_six_tenths_of_what_rounding_loses(checkpoints: dict[str, Path]) -> None:
    flags = ("--window", "1024", "--limit-windows", "2", "--baseline")
    rise = {name: run("eval.ppl", "--model", str(path), *flags)["nll_rise"] for name, path in checkpoints.items()}
    assert 0 < rise["awq"] <= 0.6 * rise["rtn"]


def test_gptq_stays_within_the_budget_of_the_whole_process(tmp_path: Path) -> None:
    """Little more than the smallest, so that states and statistics go to disk; the first layers, as all are alike.

    Refused first in the same process: how much memory imports take differs from one process to the next by 50 MiB.
    """
    model = AutoModelForCausalLM.from_pretrained(resolve_model(None), num_hidden_layers=8, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(resolve_model(None)).save_pretrained(tmp_path / "model")
    flags = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "out"), *FEW, "--asymmetric"]
    command = [sys.executable, "-c", TWICE.format(method="gptq", room_mib=20), *flags, "--group-size", "64"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "hidden states take 27.0 MiB, on the disk of" in done.stderr
    assert "statistics of a layer take" in done.stderr
    result, budget_mib = done.stdout.splitlines()
    assert json.loads(result)["peak_memory_bytes"] <= int(budget_mib) << 20


def test_streamed_equals_resident(checkpoints: dict[str, Path]) -> None:
    text = load_text(None, "evaluation")
    tokens = tokenize(text, AutoTokenizer.from_pretrained(checkpoints["awq"]))[:200]
    resident = load(checkpoints["awq"])
    on_disk = {f"model.layers.{index}": "disk" for index in range(30) if index % 4}
    streamed = load(checkpoints["awq"], device_map={"": "cpu", **on_disk})
    with torch.inference_mode():
        assert "disk" in executor_of(streamed).placement.tiers
        assert torch.equal(streamed(tokens[None]).logits, resident(tokens[None]).logits)
    executor_of(streamed).close()


GENERATE = """
import contextlib, io, re, sys
from offload.generate import main
said = io.StringIO()
with contextlib.redirect_stderr(said):
    assert main([*sys.argv[2:], "--cpu-memory", "1MiB"]) == 4
budget_mib = int(re.search(r"at least (\\d+) MiB is needed", said.getvalue())[1]) + 24
if sys.argv[1]:
    open(sys.argv[1], "w").write(str(budget_mib << 20))
assert main([*sys.argv[2:], "--cpu-memory", f"{budget_mib}MiB", "--json"]) == 0
print(budget_mib)
"""


def test_generation_stays_within_the_budget_of_the_whole_process(checkpoints: dict[str, Path]) -> None:
    """Refused first in the same process, see above: of thirty layers a dozen find room in 24 MiB."""
    prompt = ["--no-chat", "--prompt", "Once upon a time there was a king who"]
    flags = ["--model", str(checkpoints["awq"]), "--max-new-tokens", "64", *prompt]
    with memory_limited_group() as group:
        join, limit = group or (None, "")
        command = [sys.executable, "-c", GENERATE, str(limit), *flags]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, preexec_fn=join)
    assert done.returncode == 0, done.stderr
    *printed, budget_mib = done.stdout.splitlines()
    report = json.loads("\n".join(printed))
    assert report["new_tokens"] > 16
    assert report["disk_bytes_per_token"] > 0
    assert report["peak_memory_bytes"] <= int(budget_mib) << 20


def test_the_checkpoint_opens_in_plain_transformers(checkpoints: dict[str, Path]) -> None:
    reference = AutoModelForCausalLM.from_pretrained(resolve_model(None), dtype=torch.bfloat16)
    checkpoint = Checkpoint.open(checkpoints["awq"])
    for blob in checkpoint.blobs:
        content = torch.frombuffer(bytearray(blob.path.read_bytes()[blob.offset :]), dtype=torch.uint8)
        tensors = {
            name: content[spec.offset : spec.offset + spec.nbytes].view(spec.dtype).view(spec.shape)
            for name, spec in blob.tensors.items()
        }
        for name, tensor in tensors.items():
            if name.endswith(".weight_packed"):
                weight = PackedWeight(tensor.view(torch.uint8), tensors[name.replace("_packed", "_scale")], None, 64)
                reference.get_parameter(name.removesuffix("_packed")).data = dequantize(weight, torch.bfloat16)
            elif name in dict(reference.named_parameters()):
                reference.get_parameter(name).data = tensor
    opened = LlamaForCausalLM.from_pretrained(checkpoints["awq"], dtype=torch.bfloat16)
    tokens = torch.arange(100, 164)[None]
    with torch.inference_mode():
        assert torch.equal(opened(tokens).logits, reference(tokens).logits)


def from_gguf(file: Path) -> LlamaForCausalLM:
    """The embedded model in float32, its blocks dequantised by gguf itself and put under their names by hand."""
    model = LlamaForCausalLM(AutoConfig.from_pretrained(resolve_model(None))).float().eval()
    places = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    inner = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    inner |= {f"attn_{part}": f"self_attn.{part}_proj" for part in "qkv"} | {"attn_output": "self_attn.o_proj"}
    inner |= {f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}
    heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
    filled = set()
    for tensor in GGUFReader(file).tensors:
        values = torch.from_numpy(dequantize_gguf(tensor.data, tensor.tensor_type).copy())
        first, _, rest = tensor.name.removesuffix(".weight").partition(".")
        if first == "blk":
            layer, _, part = rest.partition(".")
            if part in heads:  # llama.cpp has the halves of a head interleaved
                values = values.view(heads[part], -1, 2, values.shape[1]).transpose(1, 2).reshape(values.shape)
            name = f"model.layers.{layer}.{inner[part]}.weight"
        else:
            name = f"{places[first]}.weight"
        model.get_parameter(name).data.copy_(values)
        filled.add(name)
    assert filled | {"lm_head.weight"} == set(model.state_dict())
    return model


def test_the_embedded_file_reads_as_its_reference_dequantisation() -> None:
    text = load_text(None, "evaluation")
    tokens = tokenize(text, AutoTokenizer.from_pretrained(resolve_model(None)))
    found = AutoModelForCausalLM.from_pretrained(resolve_model(None), dtype=torch.float32).eval()
    protocol = Protocol(2048, 2048, 2)
    nll = [sum(measure(model, tokens, protocol, "window")[0]) / 2 for model in (from_gguf(_embedded_gguf()), found)]
    assert abs(math.exp(nll[1] - nll[0]) - 1) <= 1e-3, nll
