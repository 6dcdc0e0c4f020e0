"""Cards say what opens a checkpoint or an export, what of that was tried, and what is known to fail."""

from pathlib import Path

import pytest
from gguf import GGUFReader

from quant import rtn
from quant.export import main
from quant.export_card import GPTQMODEL
from quant.model_card import COMPRESSED_TENSORS
from tests.test_export_gguf import model_of

ROOT = Path(__file__).parent.parent


def words(directory: Path) -> str:
    return " ".join((directory / "README.md").read_text().split())


@pytest.mark.parametrize(
    ("skipped", "joined"),
    [
        (["*.v_proj"], "qkv_proj"),
        (["*.1.mlp.gate_proj"], "gate_up_proj"),
        (["*.0.self_attn.q_proj", "*.up_proj"], "gate_up_proj, qkv_proj"),
        (["*.o_proj"], None),
        (["*.0.self_attn.*", "*.2.mlp.*"], None),
    ],
)
def test_a_part_left_alone_of_what_vllm_joins_is_said_before_and_after(
    skipped: list[str], joined: str | None, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    flags = [word for name in skipped for word in ("--skip", name)]
    assert rtn.main(["--model", str(tiny_model), "--output", str(ours), "--group-size", "32", *flags]) == 0
    said = capsys.readouterr().err
    assert ("tokens), and in transformers, vLLM\n" if joined is None else "tokens), and in transformers\n") in said
    assert main(["--model", str(ours), "--format", "awq", "--output", str(theirs)]) == 0
    if joined is None:
        assert "Nothing is known to fail." in words(ours)
        assert "they join" not in words(theirs)
    else:
        assert f"- vLLM and SGLang: they join {joined}, and refuse to where a part of it is not" in words(ours)
        assert f"- vLLM and SGLang: they join {joined}, of which a part is not quantized" in words(theirs)


@pytest.mark.parametrize(
    ("fixture", "kind", "made", "fails"),
    [
        ("tiny_checkpoint", "awq", "# rtn, for AutoAWQ's gemm 4 bits in groups of 32, symmetric, made by rtn:", False),
        ("tiny_asymmetric", "awq", "for AutoAWQ's gemm 4 bits in groups of 32, with zero points, made by rtn:", False),
        ("tiny_checkpoint", "gptq", "# rtn, for GPTQ, version 1 or 2 4 bits in groups of 32, symmetric,", False),
        ("tiny_8_bits", "gptq", "for GPTQ, version 1 or 2 8 bits in groups of 32, with zero points,", True),
    ],
)
def test_what_is_exported(
    fixture: str, kind: str, made: str, fails: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    ours, output = request.getfixturevalue(fixture), tmp_path / "out"
    assert main(["--model", str(ours), "--format", kind, "--output", str(output)]) == 0
    card = words(output)
    assert made in card
    assert "| this toolkit | yes | re-laid once when it is opened, logits equal bit for bit |" in card
    assert "gptqmodel 7.7, on a CPU | yes | the logits of this toolkit, " in card
    assert "| vLLM, SGLang | no | its names, shapes, dtypes and settings are held to the lists of vLLM's" in card
    assert "- runtimes that force float16 round norms and embeddings in bfloat16" in card
    assert ("- vLLM: its kernels take no zero points in this layout (`sym: false`)" in card) == fails


def test_a_gguf_file_says_it_of_itself(tiny_model: Path, tmp_path: Path) -> None:
    source, ours, path = model_of("llama", tiny_model, tmp_path / "model"), tmp_path / "ours", tmp_path / "theirs.gguf"
    assert rtn.main(["--model", str(source), "--output", str(ours), "--group-size", "32", "--asymmetric"]) == 0
    assert main(["--model", str(ours), "--format", "gguf", "--output", str(path)]) == 0
    said = GGUFReader(path).fields["general.description"].contents()
    assert "4 bits in groups of 32, with zero points, made by rtn; codes and scales are those of the original" in said
    assert "Minima, -z * s, are rounded to float16." in said
    assert "For llama.cpp; tried: llama-cpp-python 0.3.36 on a CPU." in said
    assert "but not the rope scaling of Llama 3" in said


def test_they_name_the_versions_that_are_tried() -> None:
    pinned = dict(line.split("==") for line in (ROOT / "requirements.txt").read_text().split())
    short = {name: ".".join(version.split(".")[:2]) for name, version in pinned.items()}
    tried = f"transformers {short['transformers']} with "
    assert f"{tried}compressed-tensors {short['compressed-tensors']}" == COMPRESSED_TENSORS
    assert GPTQMODEL.startswith(tried)
