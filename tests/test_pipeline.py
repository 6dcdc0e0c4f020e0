"""The commands that make a checkpoint: refusals come before work and name what is wrong; what they write loads."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kernels.packed import BITS, PackedWeight, dequantize
from offload.checkpoint import Checkpoint
from offload.executor import load
from quant import awq, rtn

TOKENS = torch.tensor([[5, 77, 130, 9, 200, 41, 3, 12, 250, 64, 7, 7, 18]])
SHORT = ["--num-samples", "4", "--seq-len", "32"]

Capture = pytest.CaptureFixture[str]


def copy_tokenizer(tiny_model: Path, directory: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / name, directory / name)


def llama_of_width(tiny_model: Path, directory: Path, hidden: int, inner: int, vocabulary: int = 264) -> Path:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=0,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    copy_tokenizer(tiny_model, directory)
    return directory


def changed(tiny_model: Path, directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """Copy the tiny model with other tensors."""
    shutil.copytree(tiny_model, directory)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def refused(capsys: Capture, exit_code: int, arguments: list[str], main: Callable[[list[str]], int] = rtn.main) -> str:
    """Run a command that must end with `exit_code`, print nothing on stdout, and one line of error; return that."""
    capsys.readouterr()
    found = main(arguments)
    printed = capsys.readouterr()
    assert found == exit_code, printed.err
    assert printed.out == ""
    assert "Traceback" not in printed.err
    assert printed.err.count("error: ") == 1
    return printed.err


@pytest.mark.parametrize(
    ("hidden", "inner", "asked", "message"),
    [
        (
            96,
            192,
            ["--group-size", "64"],
            r"--group-size 64: does not divide 6 linears (model.layers.0.self_attn.q_proj with 96 inputs, "
            r"model.layers.0.self_attn.k_proj with 96 inputs, model.layers.0.self_attn.v_proj with 96 inputs, ...); "
            r"--group-size 32 or row fits, or use --skip",
        ),
        (80, 160, ["--group-size", "64"], "--group-size 64: does not divide 7 linears"),
        (80, 160, ["--group-size", "64"], "; --group-size row fits, or use --skip"),
        (80, 160, [], "--group-size 128: does not divide 7 linears"),
        (76, 160, ["--group-size", "row"], "--group-size row: does not divide 6 linears"),
        (76, 160, [], "; no group size fits, or use --skip"),
    ],
)
def test_a_group_size_that_does_not_fit_is_refused_before_any_work(
    tiny_model: Path, tmp_path: Path, capsys: Capture, hidden: int, inner: int, asked: list[str], message: str
) -> None:
    model = llama_of_width(tiny_model, tmp_path / "model", hidden, inner)
    output = tmp_path / "out"
    error = refused(capsys, 2, ["--model", str(model), "--output", str(output), *asked])
    assert message in error
    assert "checking the source" not in error
    assert not output.exists()


@pytest.mark.parametrize(
    ("hidden", "inner", "group_size"), [(96, 192, 32), (64, 192, 64), (128, 256, 128), (128, 192, 64)]
)
def test_the_default_group_size_is_the_largest_that_fits(
    tiny_model: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    hidden: int,
    inner: int,
    group_size: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    llama_of_width(tiny_model, tmp_path / "model", hidden, inner)
    assert rtn.main(["--model", "model"]) == 0
    error = capsys.readouterr().err
    assert ("the largest that fits" in error) == (group_size < 128)
    if group_size < 128:
        assert f"group size {group_size}: the largest that fits, as model.layers.0." in error
    checkpoint = Checkpoint.open(Path(f"checkpoints/model-rtn-int4-g{group_size}"))
    assert checkpoint.recipe.group_size == group_size


@pytest.mark.parametrize(("bits", "hidden"), [(4, 80), (8, 76)])
def test_whole_rows_and_what_is_skipped(
    tiny_model: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, bits: int, hidden: int
) -> None:
    monkeypatch.chdir(tmp_path)
    model = llama_of_width(tiny_model, tmp_path / "model", hidden, 160)
    flags = ["--bits", str(bits), "--group-size", "row", "--skip", "*.v_proj", "--skip", "*.0.mlp.up*"]
    assert rtn.main(["--model", str(model), *flags]) == 0
    assert "5 linears, left alone: 3" in capsys.readouterr().err
    checkpoint = Checkpoint.open(Path(f"checkpoints/model-rtn-int{bits}-grow"))
    skipped = ("model.layers.0.mlp.up_proj", "model.layers.0.self_attn.v_proj")
    assert checkpoint.recipe.group_size is None
    assert checkpoint.recipe.ignore == ("lm_head", *skipped)
    tensors = checkpoint.blobs[1].tensors
    assert tensors[f"{skipped[0]}.weight"].dtype == torch.bfloat16
    assert tensors["model.layers.0.mlp.down_proj.weight_scale"].shape == (hidden, 1)
    assert tensors["model.layers.0.mlp.down_proj.weight_packed"].shape == (hidden, 160 * bits // 32)


@pytest.mark.parametrize(
    ("glob", "message"),
    [
        ("*.o_prj", "--skip '*.o_prj': matches none of 21 linears, such as 'model.layers.0.self_attn.q_proj'"),
        ("*", "--skip leaves nothing to quantize"),
    ],
)
def test_a_skip_that_cannot_be_meant(
    tiny_model: Path, tmp_path: Path, capsys: Capture, glob: str, message: str
) -> None:
    output = tmp_path / "out"
    assert message in refused(capsys, 2, ["--model", str(tiny_model), "--output", str(output), "--skip", glob])
    assert not output.exists()


def test_a_model_that_is_not_there(tmp_path: Path, capsys: Capture) -> None:
    for name in ("nobody/no-such-model", str(tmp_path / "absent")):
        error = refused(capsys, 3, ["--model", name, "--output", str(tmp_path / "out")])
        assert f"--model {name}: no such directory" in error
    (tmp_path / "empty").mkdir()
    error = refused(capsys, 3, ["--model", str(tmp_path / "empty"), "--output", str(tmp_path / "out")])
    assert "no config.json in it" in error


def write_text(path: Path, content: bytes | None) -> str:
    if content is not None:
        path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.txt", None, "absent.txt: no such file"),
        ("empty.txt", b"", "empty.txt: empty, 0 bytes"),
        ("latin.txt", b"caf\xe9 au lait", "latin.txt: not text: byte 3 is not valid UTF-8"),
        ("binary.txt", b"ab\0cd", "binary.txt: not text: byte 2 is NUL"),
        ("cut.jsonl", b'{"text": "one"}\n{"text": "tw', "cut.jsonl: line 2 is not JSON"),
        ("other.jsonl", b'{"body": "one"}', "other.jsonl: line 1: no column 'text'; found 'body'"),
        ("number.jsonl", b'{"text": 3}', "number.jsonl: line 1: column 'text' holds int, not text"),
        ("table.parquet", b"PAR1", "table.parquet: not a parquet file"),
        (
            "short.txt",
            b"a" * 100,
            "4 windows of 32 tokens need 128, it has 100; --num-samples 3 fits, or give more text",
        ),
        (
            "shorter.txt",
            b"a" * 20,
            "4 windows of 32 tokens need 128, it has 20; --seq-len 5 fits, or give more text",
        ),
    ],
)
def test_text_that_cannot_be_used(
    tiny_model: Path, tmp_path: Path, capsys: Capture, name: str, content: bytes | None, message: str
) -> None:
    calibration, output = write_text(tmp_path / name, content), tmp_path / "out"
    arguments = ["--model", str(tiny_model), "--output", str(output), "--calibration", calibration, *SHORT]
    assert message in refused(capsys, 3, arguments, awq.main)
    assert not output.exists()


def test_numbers_that_cannot_be_meant_are_refused_by_the_parser(tiny_model: Path, capsys: Capture) -> None:
    for flags in (["--num-samples", "0"], ["--seq-len", "-3"], ["--bits", "3"], ["--group-size", "48"], ["--num", "4"]):
        with pytest.raises(SystemExit) as caught:
            awq.main(["--model", str(tiny_model), *flags])
        assert caught.value.code == 2
        assert flags[0] in capsys.readouterr().err
    with pytest.raises(SystemExit):
        rtn.main(["--model", str(tiny_model), "--calibration", "text.txt"])
    error = refused(capsys, 2, ["--model", str(tiny_model), "--seq-len", "513"], awq.main)
    assert "--seq-len 513: tiny reads at most 512 tokens at once" in error


def test_an_output_that_is_not_ours_is_left_alone(tiny_model: Path, tmp_path: Path, capsys: Capture) -> None:
    foreign, file = tmp_path / "foreign", tmp_path / "file"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    file.write_text("")
    model = ["--model", str(tiny_model)]
    for overwrite in ([], ["--overwrite"]):
        error = refused(capsys, 2, [*model, "--output", str(foreign), *overwrite])
        assert f"--output {foreign}: not empty (thesis.tex); choose another directory or empty this one" in error
        assert [path.name for path in foreign.iterdir()] == ["thesis.tex"]
        assert "a file is in the way" in refused(capsys, 2, [*model, "--output", str(file), *overwrite])


def test_an_output_inside_the_model_is_refused(tiny_model: Path, tmp_path: Path, capsys: Capture) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "link").symlink_to(model)
    before = sorted(model.iterdir())
    for output in (model, model / "out", tmp_path / "link" / "deep" / "out"):
        error = refused(capsys, 2, ["--model", str(model), "--output", str(output)])
        assert f"--output {output}: lies inside the model it is made from" in error
    assert sorted(model.iterdir()) == before


def test_a_disk_that_is_too_small_is_found_out_before(
    tiny_model: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "new" / "out"
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr("quant.pipeline.shutil.disk_usage", lambda path: usage)
    error = refused(capsys, 4, ["--model", str(tiny_model), "--output", str(output)])
    assert f"--output {output}: " in error
    assert "needed, 9.8 KiB free on that disk" in error
    assert not output.exists()


NORM, UP = "model.layers.1.post_attention_layernorm.weight", "model.layers.2.mlp.up_proj.weight"


def put(name: str, value: float) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors[name].view(-1)[7:9].fill_(value)


def replace(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(UP, float("nan")), f"model.safetensors: tensor '{UP}' holds 2 NaN or infinite values"),
        (put(NORM, float("-inf")), f"model.safetensors: tensor '{NORM}' holds 2 NaN or infinite values"),
        (lambda tensors: tensors.pop(UP), f"tensor '{UP}' is missing; the download is incomplete"),
        (
            replace(UP, torch.ones(128, 32, dtype=torch.bfloat16)),
            f"model.safetensors: tensor '{UP}' is [128, 32], the configuration asks for [128, 64]",
        ),
        (
            lambda tensors: tensors.update({"model.layers.0.mlp.experts": tensors.pop(UP)}),
            "1 tensors have no place in LlamaForCausalLM (model.layers.0.mlp.experts); its weights are stored in",
        ),
        (
            replace(UP, torch.ones(128, 64, dtype=torch.float8_e4m3fn)),
            f"tensor '{UP}' has dtype F8_E4M3; expected one of",
        ),
    ],
)
@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_source_weights_that_cannot_be_used(
    tiny_model: Path,
    calibration_text: Path,
    tmp_path: Path,
    capsys: Capture,
    change: Callable[[dict[str, Tensor]], Any],
    message: str,
    method: str,
) -> None:
    model, output = changed(tiny_model, tmp_path / "model", change), tmp_path / "out"
    arguments = ["--model", str(model), "--output", str(output)]
    if method == "awq":
        arguments += ["--calibration", str(calibration_text), *SHORT]
    assert message in refused(capsys, 3, arguments, awq.main if method == "awq" else rtn.main)
    assert not output.exists()


def test_other_models_that_are_refused(
    tiny_model: Path, tiny_checkpoint: Path, calibration_text: Path, tmp_path: Path, capsys: Capture
) -> None:
    output = tmp_path / "out"
    error = refused(capsys, 3, ["--model", str(tiny_checkpoint), "--output", str(output)])
    assert f"{tiny_checkpoint}: already quantized; name the model it was made from" in error

    foreign = shutil.copytree(tiny_model, tmp_path / "gptq")
    config = json.loads((foreign / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    assert "already quantized" in refused(capsys, 3, ["--model", str(foreign), "--output", str(output)])

    pickled = shutil.copytree(tiny_model, tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors"))
    (pickled / "pytorch_model.bin").write_bytes(b"\x80")
    assert "only pickled weights, which are never run" in refused(capsys, 3, ["--model", str(pickled)])

    small = llama_of_width(tiny_model, tmp_path / "small", 64, 64, vocabulary=64)
    arguments = ["--model", str(small), "--output", str(output), "--calibration", str(calibration_text), *SHORT]
    assert "the model only 64 tokens" in refused(capsys, 3, arguments, awq.main)

    unknown = shutil.copytree(tiny_model, tmp_path / "unknown")
    (unknown / "config.json").write_text(json.dumps({**config, "model_type": "no-such-type"}))
    error = refused(capsys, 3, ["--model", str(unknown), "--output", str(output)])
    assert "transformers cannot build model_type 'no-such-type'" in error
    assert not output.exists()


def test_a_layer_without_linears_is_refused(tiny_model: Path, tmp_path: Path, capsys: Capture) -> None:
    model = tmp_path / "gpt2"
    config = transformers.GPT2Config(vocab_size=264, n_embd=64, n_layer=1, n_head=4)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(model)
    error = refused(capsys, 3, ["--model", str(model), "--output", str(tmp_path / "out")])
    assert "GPT2LMHeadModel: no list of decoder layers was found in it" in error


def test_the_plan_and_the_result_of_a_run(
    tiny_model: Path, calibration_text: Path, tmp_path: Path, capsys: Capture
) -> None:
    output = tmp_path / "out"
    arguments = ["--model", str(tiny_model), "--output", str(output), "--calibration", str(calibration_text), *SHORT]
    assert awq.main(arguments) == 0
    printed = capsys.readouterr()
    for line in (
        "model    tiny, LlamaForCausalLM, 3 layers, ",
        "method   awq, int4 symmetric, groups of 64; 21 linears, left alone: 1",
        "data     4 windows of 32 tokens; their hidden states take 32.0 KiB, in memory",
        "of memory on (context of 2048 tokens), and in transformers, vLLM",
    ):
        assert line in printed.err
    assert f"{output}: " in printed.out
    assert "mean layer error on held-out windows 0." in printed.out
    assert printed.out.endswith(f"next: python -m eval.ppl --model {output} --baseline\n")


@pytest.mark.parametrize("symmetric", [True, False])
def test_json_is_one_object_that_agrees_with_the_files(
    tiny_model: Path, calibration_text: Path, tmp_path: Path, capsys: Capture, symmetric: bool
) -> None:
    output = tmp_path / "out"
    arguments = ["--model", str(tiny_model), "--output", str(output), "--group-size", "32", "--json"]
    arguments += [] if symmetric else ["--asymmetric"]
    assert awq.main([*arguments, "--calibration", str(calibration_text), *SHORT]) == 0
    result = json.loads(capsys.readouterr().out)
    stored = sum(t.nbytes for path in output.glob("*.safetensors") for t in load_file(path).values())
    assert result["checkpoint_bytes"] == stored
    assert result["source_bytes"] == sum(t.nbytes for t in load_file(tiny_model / "model.safetensors").values())
    errors = [report["error"] for report in Checkpoint.open(output).layer_errors.values()]
    assert result["error"] == pytest.approx(sum(errors) / 3)
    assert 0 < result["error"] < result["rtn_error"]
    assert result["seconds"] >= 0
    expected = {"output": str(output), "method": "awq", "bits": 4, "group_size": 32, "symmetric": symmetric}
    assert expected.items() <= result.items()
    assert (result["layers"], result["layers_fallen_back"]) == (3, 0)

    assert rtn.main([*arguments, "--overwrite"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["method"] == "rtn"
    assert result["error"] is None


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("flags", [["--symmetric"], ["--asymmetric"], ["--group-size", "row"], ["--skip", "*.k_proj"]])
def test_the_size_is_known_before(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], bits: int
) -> None:
    expected_bytes: list[int] = []

    def card(*arguments: Any) -> bytes:
        expected_bytes.append(arguments[-2])
        return b""

    monkeypatch.setattr("quant.pipeline.model_card", card)
    output = tmp_path / "out"
    assert rtn.main(["--model", str(tiny_model), "--output", str(output), "--bits", str(bits), *flags]) == 0
    assert expected_bytes == [Checkpoint.open(output).nbytes]


def snapshot(directory: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in directory.iterdir()}


def test_a_second_run_finds_it_complete_and_another_recipe_needs_overwrite(
    tiny_model: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: Capture
) -> None:
    output = tmp_path / "out"
    arguments = ["--model", str(tiny_model), "--output", str(output), "--group-size", "32"]
    assert rtn.main(arguments) == 0
    before = snapshot(output)
    capsys.readouterr()
    assert rtn.main(arguments) == 0
    printed = capsys.readouterr()
    assert f"{output}: already complete" in printed.err
    assert f"{output}: " in printed.out
    assert snapshot(output) == before

    error = refused(capsys, 2, [*arguments, "--asymmetric"])
    assert (
        f"--output {output}: holds a finished checkpoint of another recipe (symmetric: True there, False asked)"
        in error
    )
    assert snapshot(output) == before

    (output / "notes.txt").write_text("mine")
    error = refused(capsys, 2, [*arguments, "--asymmetric", "--overwrite"])
    assert "not empty (notes.txt)" in error
    (output / "notes.txt").unlink()
    assert rtn.main([*arguments, "--asymmetric", "--overwrite"]) == 0
    assert not Checkpoint.open(output).recipe.symmetric
    assert rtn.main([*arguments, "--overwrite"]) == 0
    same = {path.name: path.read_bytes() for path in tiny_checkpoint.iterdir() if path.suffix == ".safetensors"}
    assert same.items() <= {name: content for name, (content, _) in snapshot(output).items()}.items()


def test_calibration_from_jsonl(tiny_model: Path, calibration_text: Path, tmp_path: Path, capsys: Capture) -> None:
    """Rows are joined by blank lines; the same text in a file of its own gives the same weights."""
    rows = [calibration_text.read_text()[i : i + 150] for i in range(0, 1500, 150)]
    table, plain = tmp_path / "rows.jsonl", tmp_path / "plain.md"
    table.write_text("\n\n".join(json.dumps({"text": row, "id": i}) for i, row in enumerate(rows)) + "\n")
    plain.write_text("\n\n".join(rows))
    recipes, tensors = [], []
    for text in (table, plain):
        output = tmp_path / text.stem
        arguments = ["--model", str(tiny_model), "--output", str(output), "--calibration", str(text), *SHORT]
        assert awq.main(arguments) == 0
        recipes.append(Checkpoint.open(output).recipe)
        tensors.append({path.name: path.read_bytes() for path in output.glob("*.safetensors")})
    assert [recipe.calibration_name for recipe in recipes] == ["rows.jsonl", "plain.md"]
    assert recipes[0].calibration_sha256 == recipes[1].calibration_sha256
    assert tensors[0] == tensors[1]


def test_one_window_is_enough(tiny_model: Path, calibration_text: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = ["--model", str(tiny_model), "--output", str(output), "--calibration", str(calibration_text)]
    assert awq.main([*arguments, "--num-samples", "1", "--seq-len", "16"]) == 0
    assert Checkpoint.open(output).recipe.num_samples == 1


def reference(
    model: Path, directory: Path, dtype: torch.dtype, dequantized: torch.dtype | None = None
) -> PreTrainedModel:
    """Load the original with transformers and put the checkpoint's weights, dequantized by us, into it."""
    built: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    checkpoint = Checkpoint.open(directory)
    tensors = {key: tensor for blob in checkpoint.blobs for key, tensor in load_file(blob.path).items()}
    for key, tensor in tensors.items():
        stem, _, part = key.rpartition(".")
        if part == "weight_packed":
            scale, zero = tensors[f"{stem}.weight_scale"], tensors.get(f"{stem}.weight_zero_point")
            size, bits = checkpoint.recipe.group_size, checkpoint.recipe.bits_of(stem)
            weight = PackedWeight(tensor.view(torch.uint8), scale, zero, size or tensor.shape[1] * 32 // bits, bits)
            built.get_parameter(f"{stem}.weight").data = dequantize(weight, dequantized or dtype).to(dtype)
        elif not part.startswith("weight_"):
            built.get_parameter(key).data = tensor.to(dtype)
    return built


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("rtn", ["--group-size", "32"]),
        ("rtn", ["--group-size", "32", "--asymmetric"]),
        ("rtn", ["--group-size", "row"]),
        ("awq", ["--group-size", "64", "--skip", "*.1.self_attn.*"]),
        ("awq", ["--group-size", "64", "--asymmetric"]),
        ("awq", ["--group-size", "64", "--target-bits", "6"]),
        ("rtn", ["--bits", "8", "--group-size", "row"]),
        ("awq", ["--bits", "8", "--group-size", "64"]),
        ("rtn", ["--bits", "8", "--group-size", "32", "--asymmetric"]),
    ],
)
@torch.inference_mode()
def test_plain_transformers_reads_what_we_wrote(
    tiny_model: Path, calibration_text: Path, tmp_path: Path, method: str, flags: list[str], dtype: torch.dtype
) -> None:
    output = tmp_path / "out"
    arguments = ["--model", str(tiny_model), "--output", str(output), *flags]
    if method == "awq":
        arguments += ["--calibration", str(calibration_text), *SHORT]
    assert (awq.main if method == "awq" else rtn.main)(arguments) == 0
    how, dequantized = {}, dtype
    if "--asymmetric" in flags:  # this way compressed-tensors computes weights in the dtype of the scales
        how, dequantized = {"quantization_config": CompressedTensorsConfig(dequantize=True)}, torch.bfloat16
    theirs = LlamaForCausalLM.from_pretrained(output, dtype=dtype, **how)  # the class that offload leaves alone
    expected = reference(tiny_model, output, dtype, dequantized)(TOKENS).logits
    assert torch.isfinite(expected).all()
    assert torch.equal(theirs(TOKENS).logits, expected)
    original = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype)
    assert not torch.equal(original(TOKENS).logits, expected)


@pytest.mark.parametrize("flags", [["--symmetric"], ["--asymmetric"]])
@torch.inference_mode()
def test_8_bits_are_much_nearer_to_the_original_than_4(tiny_model: Path, tmp_path: Path, flags: list[str]) -> None:
    expected = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)(TOKENS).logits
    errors = {}
    for bits in BITS:
        output = tmp_path / str(bits)
        arguments = ["--model", str(tiny_model), "--output", str(output), "--group-size", "32", *flags]
        assert rtn.main([*arguments, "--bits", str(bits)]) == 0
        errors[bits] = (load(output, dtype=torch.float32, mode="exact")(TOKENS).logits - expected).norm()
    assert 0 < errors[8] < errors[4] / 10


def test_the_model_card(tiny_model: Path, calibration_text: Path, tmp_path: Path) -> None:
    cards = {}
    for name, flags in (("symmetric", []), ("asymmetric", ["--asymmetric"])):
        output = tmp_path / name
        arguments = ["--model", str(tiny_model), "--output", str(output), "--calibration", str(calibration_text)]
        assert awq.main([*arguments, *SHORT, "--group-size", "32", "--seed", "3", *flags]) == 0
        card = cards[name] = (output / "README.md").read_text()
        recipe = Checkpoint.open(output).recipe
        assert card.startswith("---\n")
        front = card.split("---\n")[1]
        assert f"base_model: {tiny_model}\n" in front
        assert "tags: [int4, awq, compressed-tensors]" in front
        words = " ".join(card.split())
        assert "# tiny, AWQ int4" in words
        assert (
            f"in 4 bits, {name}, groups of 32; calibrated on 4 windows of 32 tokens of {calibration_text.name}" in words
        )
        assert f"(sha256 {recipe.calibration_sha256}), seed 3" in words
        assert f"python -m offload.generate --model {name} --cpu-memory 448MiB" in words
        assert f'AutoModelForCausalLM.from_pretrained("{name}"' in words
        assert "| this toolkit | yes |" in words
        assert (
            "| vLLM, SGLang | no | format `pack-quantized`; its names, shapes, dtypes and settings are held to" in words
        )
    assert "quantization_config=CompressedTensorsConfig(dequantize=True)" in cards["asymmetric"]
    assert "on a CPU | yes | only with `dequantize=True`, equal bit for bit" in cards["asymmetric"]
    assert "- transformers without `dequantize=True`: compressed-tensors since 0.18 refuses" in cards["asymmetric"]
    assert "dequantize=True" not in cards["symmetric"]
    assert "on a CPU | yes | logits equal bit for bit" in cards["symmetric"]
    assert "Nothing is known to fail." in cards["symmetric"]

    for flag, count in (("--symmetric", 1), ("--asymmetric", 0)):
        output = tmp_path / f"mixed{flag}"
        arguments = ["--model", str(tiny_model), "--output", str(output), "--calibration", str(calibration_text)]
        assert awq.main([*arguments, *SHORT, "--group-size", "32", flag, "--target-bits", "6"]) == 0
        words = " ".join((output / "README.md").read_text().split())
        assert f"in 4 bits ({len(Checkpoint.open(output).recipe.wide)} linears in 8), {flag[2:]}" in words
        assert words.count("AutoModelForCausalLM.from_pretrained(") == count
        assert ("| yes | does not open it, see below |" in words) == (count == 0)
        assert ("- transformers: zero points and two widths; its default path refuses the" in words) == (count == 0)

    output = tmp_path / "rows"
    assert rtn.main(["--model", str(tiny_model), "--output", str(output), "--bits", "8", "--group-size", "row"]) == 0
    words = " ".join((output / "README.md").read_text().split())
    assert "tags: [int8, rtn, compressed-tensors]" in words
    assert "# tiny, RTN int8" in words
    assert "in 8 bits, symmetric, one group a row; no calibration, seed 0" in words


def test_tokenizer_and_settings_are_copied_byte_for_byte(tiny_model: Path, tiny_checkpoint: Path) -> None:
    names = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    for name in names:
        assert (tiny_checkpoint / name).read_bytes() == (tiny_model / name).read_bytes()
    before, after = (json.loads((path / "config.json").read_text()) for path in (tiny_model, tiny_checkpoint))
    assert after.pop("quantization_config")["format"] == "pack-quantized"
    assert after == before
