"""The rows of docs/faults.md that no other test holds, and that what is promised names tests that exist."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from directories import rewritten

from offload import load
from offload.checkpoint import Checkpoint
from offload.command import Parser
from offload.errors import CheckpointError, InputError
from offload.generate import main as generate
from offload.skeleton import read_config
from quant import awq, gptq, rtn

ROOT = Path(__file__).parent.parent
UP = "model.layers.1.mlp.up_proj"
NUMBER_OF_ROWS = 93


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_codes_of_another_dtype_are_refused(tiny_checkpoint: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    name = f"{UP}.weight_packed"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].to(dtype)

    directory = rewritten(tiny_checkpoint, tmp_path / "copy", change)
    with pytest.raises(CheckpointError, match=re.escape(f"'{name}' is {dtype} [")):
        load(directory)


@pytest.mark.parametrize("placement", [[], ["--device-map", "disk"]], ids=["resident", "streamed"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_end_the_text_and_name_the_layer(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], placement: list[str], value: float
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.post_attention_layernorm.weight"][5] = value

    directory = rewritten(tiny_checkpoint, tmp_path / "copy", change)
    assert generate(["--model", str(directory), "--prompt", "The", "--no-chat", *placement]) == 3
    said = capsys.readouterr()
    assert said.out.strip() == ""
    assert "tokens the model's logits are NaN or infinite; model.layers.1 is the first layer whose" in said.err


@pytest.mark.parametrize("method", [awq, gptq])
def test_samples_that_are_all_the_same_calibrate(tiny_model: Path, tmp_path: Path, method: Any) -> None:
    text = tmp_path / "same.txt"
    text.write_text("a" * 1000)
    output = tmp_path / "out"
    flags = ["--group-size", "32", "--num-samples", "8", "--seq-len", "32", "--calibration", str(text)]
    assert method.main(["--model", str(tiny_model), "--output", str(output), *flags]) == 0
    model = load(output)
    logits = model(torch.tensor([[1, 2, 3]])).logits
    assert torch.isfinite(logits).all()


def test_two_tensors_of_one_shape_swapped_are_caught(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    blob = Checkpoint.open(directory).blobs[2]
    gate, up = (blob.tensors[f"{blob.module}.mlp.{name}_proj.weight_packed"] for name in ("gate", "up"))
    content = bytearray(blob.path.read_bytes())
    places = [slice(blob.offset + spec.offset, blob.offset + spec.offset + spec.nbytes) for spec in (gate, up)]
    content[places[0]], content[places[1]] = content[places[1]], content[places[0]]
    blob.path.write_bytes(content)
    assert generate(["--model", str(directory), "--prompt", "The", "--no-chat", "--device-map", "disk"]) == 3
    assert "mlp.gate_proj.weight_packed' is damaged" in capsys.readouterr().err


def test_two_sets_of_weights_are_refused(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    assert rtn.main(["--model", str(model), "--output", str(tmp_path / "out")]) == 3
    assert "both model.safetensors.index.json and model.safetensors, two sets of weights" in capsys.readouterr().err


def test_a_tensor_in_two_files_is_refused(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "model.safetensors").rename(model / "a.safetensors")
    shutil.copy(model / "a.safetensors", model / "b.safetensors")
    weight_map = {"model.norm.weight": "a.safetensors", "model.embed_tokens.weight": "b.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert rtn.main(["--model", str(model), "--output", str(tmp_path / "out")]) == 3
    assert re.search(r"b\.safetensors: tensor '.*' stands in a\.safetensors as well", capsys.readouterr().err)


def test_a_tokenizer_that_is_missing_is_refused_before_any_work(
    tiny_model: Path, calibration_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, output = shutil.copytree(tiny_model, tmp_path / "model"), tmp_path / "out"
    for path in model.glob("tokenizer*"):
        path.unlink()
    flags = ["--calibration", str(calibration_text), "--num-samples", "8", "--seq-len", "32"]
    assert awq.main(["--model", str(model), "--output", str(output), *flags]) == 3
    assert f"error: {model}: no tokenizer that transformers can load (" in capsys.readouterr().err
    assert not output.exists()


def test_generation_defaults_that_are_damaged_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    (directory / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json: cannot be read \(.*not a valid JSON"):
        load(directory)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_scales_that_are_not_finite_are_refused_before_a_token(
    tiny_checkpoint: Path, tmp_path: Path, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"{UP}.weight_scale"
    directory = rewritten(tiny_checkpoint, tmp_path / "copy", lambda tensors: tensors[name].view(-1)[3].fill_(value))
    for device_map in ("cpu", "disk"):
        flags = ["--prompt", "The", "--no-chat", "--max-new-tokens", "2", "--device-map", device_map]
        assert generate(["--model", str(directory), *flags]) == 3
        output = capsys.readouterr()
        assert f"tensor '{name}' holds 1 NaN or infinite scales" in output.err
        assert output.out == ""


def test_a_pattern_out_of_a_configuration_is_never_a_regular_expression(tiny_model: Path, tmp_path: Path) -> None:
    """The classic that takes for ever: were it matched against 40 letters, the time limit would end this test."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    quantized = {"quant_method": "gptq", "bits": 4, "group_size": 32, "modules_to_not_convert": ["(a+)+$"] * 3}
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": quantized}))
    started = time.monotonic()
    assert rtn.main(["--model", str(model), "--output", str(tmp_path / "out")]) == 3
    assert rtn.main(["--model", str(tiny_model), "--output", str(tmp_path / "out"), "--skip", "(a+)+$"]) == 2
    assert time.monotonic() - started < 30


NAMES = {
    "spaces": "a model of mine",
    "letters": "模型-ü",
    "emoji": "🦙",
    "dash": "-m",
    "long": "x" * 200,
    "line": "a\nb",
}


@pytest.mark.parametrize("kind", NAMES)
def test_any_path_works(
    kind: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    name = NAMES[kind]
    shutil.copytree(tiny_model, tmp_path / name)
    assert rtn.main([f"--model={name}", f"--output=./{name}-int4", "--group-size", "32"]) == 0
    capsys.readouterr()
    assert generate([f"--model=./{name}-int4", "--prompt", "The", "--no-chat", "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_calibration_that_then_resumes(
    tiny_model: Path, calibration_text: Path, tmp_path: Path, sent: signal.Signals, status: int
) -> None:
    def flags(output: Path) -> list[str]:
        amount = ["--num-samples", "8", "--seq-len", "32", "--group-size", "32"]
        return ["--model", str(tiny_model), "--output", str(output), "--calibration", str(calibration_text), *amount]

    output, whole = tmp_path / "out", tmp_path / "whole" / "out"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "quant.awq", *flags(output)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    while process.poll() is None and not (output / "partial" / "00001.json").exists():
        time.sleep(0.001)
    process.send_signal(sent)
    sent_at = time.monotonic()
    _, told = process.communicate()
    if process.returncode:  # else it was through before it was hit
        assert time.monotonic() - sent_at < 10
        assert process.returncode == status, told
        assert "Traceback" not in told
        with pytest.raises(CheckpointError, match="calibration has not finished"):
            Checkpoint.open(output)
    assert awq.main(flags(output)) == 0
    assert awq.main(flags(whole)) == 0
    for shard in sorted(whole.glob("*.safetensors")):
        assert (output / shard.name).read_bytes() == shard.read_bytes()


def test_more_tokens_than_the_context_has_are_capped_and_none_are_refused(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", str(tiny_checkpoint), "--prompt", "The", "--no-chat", "--json"]
    for count in ("0", "-1"):
        assert generate([*flags, "--max-new-tokens", count]) == 2
        assert capsys.readouterr().err == f"error: --max-new-tokens {count}: expected at least 1\n"
    assert generate([*flags, "--max-new-tokens", "9" * 30]) == 0
    assert 1 <= json.loads(capsys.readouterr().out)["new_tokens"] < 512
    assert generate([*flags[:2], "--prompt", "x" * 600, "--no-chat"]) == 3
    assert "the prompt has 600 tokens, the context only 512" in capsys.readouterr().err


def test_a_misspelt_flag_is_guessed(capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser("offload.generate", "")
    parser.add_argument("--cpu-memory")
    for argument in ("--cpu-memroy", "--cpu-memroy=8GiB"):
        with pytest.raises(SystemExit) as caught:
            parser.parse_args([argument])
        assert caught.value.code == 2
        assert f"unrecognized arguments: {argument}; did you mean --cpu-memory?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parser.parse_args(["--zebra"])
    assert "did you mean" not in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"hidden_size": 1 << 40}, {"num_hidden_layers": 0}, {"vocab_size": -1}])
def test_a_configuration_of_hostile_sizes_is_refused_quickly(
    tiny_model: Path, tmp_path: Path, change: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | change))
    started = time.monotonic()
    status = rtn.main(["--model", str(model), "--output", str(tmp_path / "out"), "--group-size", "32"])
    error = capsys.readouterr().err
    assert status == 3, error
    assert time.monotonic() - started < 20
    assert "Traceback" not in error
    assert "bug:" not in error


def test_a_configuration_that_is_cut_off(tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    content = (model / "config.json").read_bytes()
    (model / "config.json").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="not valid JSON"):
        read_config(model)


def table() -> dict[int, str]:
    """Return the rows of docs/faults.md, by number: what stands in their last column."""
    lines = (ROOT / "docs" / "faults.md").read_text().splitlines()
    found = [re.fullmatch(r"\| (\d+) \| [^|]+ \| [^|]+ \| ([^|]+) \|", line) for line in lines]
    return {int(match[1]): match[2] for match in found if match}


def test_the_table_has_every_row_and_the_tests_it_names_exist() -> None:
    rows = table()
    assert sorted(rows) == list(range(1, NUMBER_OF_ROWS + 1))
    for number, text in rows.items():
        assert named_tests(text) or text.startswith(("not tested: ", "does not apply: ")), f"row {number}: {text}"


def named_tests(text: str) -> list[str]:
    """Return the tests that a cell of a table names; each of them exists."""
    named = re.findall(r"`(\w+)::(\w+)`", text)
    for file, function in named:
        assert f"def {function}(" in (ROOT / "tests" / f"{file}.py").read_text(), f"no {function} in {file}.py"
    return [function for _, function in named]


def test_every_promise_names_its_tests_and_they_exist() -> None:
    promises = [line for line in (ROOT / "SECURITY.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert len(promises) >= 10
    assert all(named_tests(line) for line in promises)
    shown = re.findall(r"`tests/(\w+\.py)`", (ROOT / "README.md").read_text())
    assert len(shown) > 20
    assert all((ROOT / "tests" / name).is_file() for name in shown)


def test_the_count_above_the_table_is_that_of_its_rows() -> None:
    rows = table().values()
    untested = sum(text.startswith("not tested: ") for text in rows)
    elsewhere = sum(text.startswith("does not apply: ") for text in rows)
    tried = NUMBER_OF_ROWS - untested - elsewhere
    said = f"{NUMBER_OF_ROWS} rows: {tried} have tests; not applicable: {elsewhere}; not tested: {untested}."
    assert said in (ROOT / "docs" / "faults.md").read_text()
