"""The walk: killed at any moment and resumed it writes the same bytes; one layer at a time, fed by quantized ones."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from directories import contents
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from kernels.packed import BITS, PackedWeight, dequantize
from offload.checkpoint import Checkpoint
from offload.checkpoint_writer import CheckpointWriter, write_safetensors
from offload.errors import CheckpointError
from offload.skeleton import assign, decoder_layers
from offload.text import load_text, sample_windows, tokenize
from quant import awq, rtn
from quant.cost import Cost, Shape, Windows
from quant.groupwise import Grid, Parameters, minmax, pack_weight
from quant.layer import LayerInputs
from quant.pipeline import run_method
from quant.walk import Walk, release, restore, stored_tensors

SAMPLES, TOKENS = 8, 32
GRID_FLAGS = ["--group-size", "32"]


def awq_flags(model: Path, text: Path, output: Path, *more: str) -> list[str]:
    calibration = ["--calibration", str(text), "--num-samples", str(SAMPLES), "--seq-len", str(TOKENS)]
    return ["--model", str(model), "--output", str(output), *GRID_FLAGS, *calibration, *more]


def shards(directory: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(directory).items() if name.endswith(".safetensors")}


@pytest.fixture(scope="module")
def uninterrupted(tiny_model: Path, calibration_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "out"
    assert awq.main(awq_flags(tiny_model, calibration_text, output)) == 0
    return output


def run_until_killed(arguments: list[str], survived: Path) -> None:
    """Quantize, and die by SIGKILL at the first moment that is not among those in `survived`, which it is added to.

    Moments are the first write of every file, of which half is written, and its renaming, which is not done.
    """
    known = set(survived.read_text().splitlines())
    write, rename = os.write, os.rename

    def die(moment: str) -> None:
        with survived.open("a") as file:
            file.write(f"{moment}\n")
        os.kill(os.getpid(), signal.SIGKILL)

    def dying_write(descriptor: int, data: memoryview) -> int:
        moment = f"write {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}"
        if moment not in known:
            write(descriptor, data[: len(data) // 2])
            die(moment)
        return write(descriptor, data)

    def dying_rename(source: Path, target: Path) -> None:
        if f"rename {source.name}" not in known:
            die(f"rename {source.name}")
        rename(source, target)

    torch.set_num_threads(1)
    os.write, os.rename = dying_write, dying_rename  # type: ignore[assignment]
    sys.exit(awq.main(arguments))


def test_killed_at_every_moment_and_resumed_it_is_the_same(
    tiny_model: Path, calibration_text: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    output, survived = tmp_path / "out", tmp_path / "survived"
    survived.touch()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["quant.awq", "quant.pipeline", "transformers.models.llama.modeling_llama"])
    arguments = awq_flags(tiny_model, calibration_text, output)
    for _ in range(100):
        process = context.Process(target=run_until_killed, args=(arguments, survived))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        with pytest.raises(CheckpointError, match="calibration has not finished; run the same quant command again"):
            Checkpoint.open(output)
    moments = survived.read_text().splitlines()
    files = [f"model-{i:05d}-of-00005.safetensors" for i in range(1, 6)] + [f"{i:05d}.json" for i in range(5)]
    for name in [*files, "recipe.json", "config.json", "tokenizer.json", "README.md", "manifest.json"]:
        assert f"write .{name}.tmp" in moments
        assert f"rename .{name}.tmp" in moments
    assert contents(output) == contents(uninterrupted)


def test_killed_from_outside_it_resumes(
    tiny_model: Path, calibration_text: Path, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for attempt in range(3):  # on a busy machine the run may end before it is seen to have begun
        output = tmp_path / str(attempt) / "out"
        arguments = awq_flags(tiny_model, calibration_text, output)
        command = [sys.executable, "-m", "quant.awq", *arguments]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
        while process.poll() is None and not (output / "partial" / "00001.json").exists():
            time.sleep(0.002)
        process.kill()
        if process.wait() == -signal.SIGKILL:
            break
    assert process.returncode == -signal.SIGKILL
    assert not (output / "manifest.json").exists()
    assert awq.main(arguments) == 0
    assert "of 3 layers are done and verified" in capsys.readouterr().err
    assert contents(output) == contents(uninterrupted)


def stop_before(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the writing of shard `index` fail."""
    write_shard = CheckpointWriter.write_shard

    def stopping(self: CheckpointWriter, at: int, *rest: Any) -> None:
        if at == index:
            raise RuntimeError("stopped")
        write_shard(self, at, *rest)

    monkeypatch.setattr(CheckpointWriter, "write_shard", stopping)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_finished_layer_that_is_damaged_is_made_again(
    tiny_model: Path,
    calibration_text: Path,
    uninterrupted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: str,
) -> None:
    output = tmp_path / "out"
    arguments = awq_flags(tiny_model, calibration_text, output)
    with pytest.MonkeyPatch.context() as patch:
        stop_before(4, patch)
        assert awq.main(arguments) == 1
    path = output / "model-00003-of-00005.safetensors"
    content = bytearray(path.read_bytes())
    content[-500] ^= 1
    path.write_bytes(content if damage == "flip" else content[:-500])
    if damage == "remove":
        path.unlink()
    capsys.readouterr()
    assert awq.main(arguments) == 0
    assert "resuming: 2 of 3 layers are done and verified" in capsys.readouterr().err
    assert contents(output) == contents(uninterrupted)


def test_a_linear_that_is_left_alone_is_run_as_it_is_stored(
    tiny_model: Path, calibration_text: Path, tmp_path: Path
) -> None:
    """Scales go into the skipped linears too, and the file rounds those; a resumed run sees them rounded."""
    whole, resumed = tmp_path / "whole" / "out", tmp_path / "resumed" / "out"
    assert awq.main(awq_flags(tiny_model, calibration_text, whole, "--skip", "*.v_proj")) == 0
    arguments = awq_flags(tiny_model, calibration_text, resumed, "--skip", "*.v_proj")
    with pytest.MonkeyPatch.context() as patch:
        stop_before(2, patch)
        assert awq.main(arguments) == 1
    assert awq.main(arguments) == 0
    assert contents(resumed) == contents(whole)
    stored = load_file(whole / "model-00002-of-00005.safetensors")["model.layers.0.self_attn.v_proj.weight"]
    source = load_file(tiny_model / "model.safetensors")["model.layers.0.self_attn.v_proj.weight"]
    assert stored.dtype == source.dtype
    assert not torch.equal(stored, source)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_a_restored_layer_is_the_written_one(tmp_path: Path, symmetric: bool, bits: int) -> None:
    grid, layer = Grid(32, symmetric, bits=bits), nn.Module()
    layer.linear, layer.norm = nn.Linear(64, 16), nn.LayerNorm(64, dtype=torch.bfloat16)
    layer.register_buffer("table", torch.arange(2**33, 2**33 + 5))
    layer.requires_grad_(False)
    packed = pack_weight(layer.linear.weight, minmax(layer.linear.weight, grid), grid)
    tensors = {f"model.layers.7.{key}": tensor for key, tensor in layer.state_dict().items()}
    del tensors["model.layers.7.linear.weight"]
    tensors |= {f"model.layers.7.linear.{part}": tensor for part, tensor in stored_tensors(packed).items()}
    write_safetensors(tmp_path / "shard.safetensors", tensors)
    expected = {key: t.float() if t.is_floating_point() else t for key, t in layer.state_dict().items()}
    expected["linear.weight"] = dequantize(packed)
    release(layer)
    assert all(tensor.is_meta for tensor in layer.state_dict().values())
    restore(layer, "model.layers.7", tmp_path / "shard.safetensors", {"linear": grid})
    found = layer.state_dict()
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor)


def test_the_seed_decides_the_bytes(
    tiny_model: Path, calibration_text: Path, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again, other = tmp_path / "again" / "out", tmp_path / "other" / "out"
    torch.manual_seed(99)
    assert awq.main(awq_flags(tiny_model, calibration_text, again)) == 0
    assert contents(again) == contents(uninterrupted)
    assert awq.main(awq_flags(tiny_model, calibration_text, other, "--seed", "1")) == 0
    assert Checkpoint.open(other).recipe.seed == 1
    one, two = shards(other), shards(uninterrupted)
    assert [one[name] == two[name] for name in sorted(one)] == [True, False, False, False, True]
    capsys.readouterr()
    assert awq.main(awq_flags(tiny_model, calibration_text, other)) == 2
    assert "of another recipe (seed: 1 there, 0 asked); use --overwrite" in capsys.readouterr().err


def test_one_layer_at_most_is_in_memory(
    tiny_model: Path, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[nn.Module] = []
    loaded: list[list[int]] = []
    outside: list[int] = []
    make_layer = Walk._layer

    def observing_layer(self: Walk, *arguments: Any) -> str:
        if not models:
            models.append(self.model)
        return make_layer(self, *arguments)

    def observing_assign(module: nn.Module, name: str, tensor: Tensor) -> None:
        assign(module, name, tensor)
        for model in models:
            prefix, layers = decoder_layers(model)
            real = [any(not p.is_meta for p in layer.parameters()) for layer in layers]
            loaded.append([index for index, here in enumerate(real) if here])
            others = [p for key, p in model.named_parameters() if not key.startswith(prefix)]
            outside.append(sum(not p.is_meta for p in others))

    monkeypatch.setattr(Walk, "_layer", observing_layer)
    monkeypatch.setattr("quant.walk.assign", observing_assign)
    assert awq.main(awq_flags(tiny_model, calibration_text, tmp_path / "out")) == 0
    assert {index for layers in loaded for index in layers} == {0, 1, 2}
    assert max(len(layers) for layers in loaded) == 1
    assert loaded[-1] == []
    assert max(outside) == 0


def test_memory_is_given_back_after_each_layer_once_it_is_written_and_dropped(
    tiny_model: Path, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left between the blocks of others grows by 10 MiB a layer of a real model; here only the order shows."""
    moments: list[str] = []
    walks: list[Walk] = []
    run, write_shard = Walk.run, CheckpointWriter.write_shard

    def seen_run(self: Walk, windows: Tensor | None) -> None:
        walks.append(self)
        run(self, windows)

    def seen_write(self: CheckpointWriter, index: int, *arguments: Any) -> None:
        write_shard(self, index, *arguments)
        moments.append(f"written {index}")

    def trim() -> None:
        _, layers = decoder_layers(walks[0].model)
        loaded = [p for layer in layers for p in layer.parameters() if not p.is_meta]
        moments.append("trimmed" if not loaded else "trimmed while a layer was held")

    monkeypatch.setattr(Walk, "run", seen_run)
    monkeypatch.setattr(CheckpointWriter, "write_shard", seen_write)
    monkeypatch.setattr("quant.walk.trim_memory", trim)
    assert awq.main(awq_flags(tiny_model, calibration_text, tmp_path / "out")) == 0
    layers = [moment for index in (1, 2, 3) for moment in (f"written {index}", "trimmed")]
    assert moments == ["written 0", *layers, "written 4"]


def dequantized_reference(model: Path, directory: Path) -> PreTrainedModel:
    """Load the original with transformers, in float32, and put the finished checkpoint's weights into it."""
    reference: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tensors = {key: t for path in directory.glob("*.safetensors") for key, t in load_file(path).items()}
    for key, tensor in tensors.items():
        stem, _, part = key.rpartition(".")
        if part == "weight_packed":
            weight = PackedWeight(tensor.view(torch.uint8), tensors[f"{stem}.weight_scale"], None, 32)
            reference.get_parameter(f"{stem}.weight").data = dequantize(weight)
        elif not part.startswith("weight_"):
            reference.get_parameter(key).data = tensor.float()
    return reference


def test_a_layer_is_calibrated_on_what_the_quantized_ones_before_it_give(
    tiny_model: Path, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    quantize_layer = awq.Awq.quantize_layer

    def observing(self: awq.Awq, layer: nn.Module, inputs: Any, *rest: Any) -> Any:
        seen.append(inputs.hidden_STD.clone())
        return quantize_layer(self, layer, inputs, *rest)

    monkeypatch.setattr(awq.Awq, "quantize_layer", observing)
    output = tmp_path / "out"
    assert awq.main(awq_flags(tiny_model, calibration_text, output, "--seed", "5")) == 0

    text = load_text(str(calibration_text), "calibration")
    tokens = tokenize(text, AutoTokenizer.from_pretrained(tiny_model))
    windows = sample_windows(tokens, SAMPLES, TOKENS, 5)[: SAMPLES - 1]  # the last one is held out
    original = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.inference_mode():
        expected = dequantized_reference(tiny_model, output)(windows, output_hidden_states=True).hidden_states
        unquantized = original(windows, output_hidden_states=True).hidden_states
    assert len(seen) == 3
    for index, hidden_STD in enumerate(seen):
        torch.testing.assert_close(hidden_STD, expected[index], rtol=1e-4, atol=1e-4)
        off = (hidden_STD - unquantized[index]).abs().max()
        assert off == 0 if index == 0 else off > 0.1


def test_held_out_samples_run_through_the_layer_as_written_once(
    tiny_model: Path, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they are judged by goes into the next layer; where one falls back to nearest they run again."""
    ran: list[int] = []
    outputs = LayerInputs.outputs

    def counting(self: LayerInputs, layer: nn.Module) -> Iterator[Tensor]:
        ran.append(len(self.hidden_STD))
        return outputs(self, layer)

    monkeypatch.setattr(LayerInputs, "outputs", counting)
    arguments = awq_flags(tiny_model, calibration_text, tmp_path / "out", "--num-samples", "24")
    assert run_method("spoiling", lambda _: Spoiling(1, spoil_weights), arguments, {"only": None}) == 0
    layer, again, fed = [3, 3, 21, 3], 3, 21  # unquantized, to nearest, what samples reach, as written
    assert ran == [*layer, fed, *layer, again, fed, *layer]


class Spoiling:
    """Rounds to nearest, but spoils one layer, or all of them."""

    name = "spoiling"
    needs_inputs = True
    needs_original = False
    pass_dtype = torch.float32

    def __init__(self, layer: int | None, spoil: Callable[[nn.Module], Any]) -> None:
        self.layer, self.spoil, self.seen = layer, spoil, 0

    def settings_json(self) -> dict[str, Any]:
        return {}

    def cost(self, shapes: list[Shape], grid: Grid, windows: Windows | None) -> Cost:
        return Cost.of_rounding(shapes)

    def quantize_layer(
        self, layer: nn.Module, inputs: Any, grids: dict[str, Grid], head_dim: int
    ) -> tuple[dict[str, Parameters], dict[str, Any]]:
        found = {name: minmax(layer.get_parameter(f"{name}.weight").data, grid) for name, grid in grids.items()}
        if self.layer in (None, self.seen):
            self.spoil(layer)
        self.seen += 1
        return found, {"what": "was chosen"}


def spoil_norm(layer: nn.Module) -> None:
    layer.get_parameter("input_layernorm.weight").data *= 1.5


def spoil_weights(layer: nn.Module) -> None:
    layer.get_parameter("mlp.down_proj.weight").data.neg_()


def spoil_with_nan(layer: nn.Module) -> None:
    layer.get_parameter("post_attention_layernorm.weight").data[3] = float("nan")


@pytest.mark.parametrize("spoil", [spoil_norm, spoil_weights, spoil_with_nan])
@pytest.mark.parametrize("layer", [None, 1])
def test_a_layer_worse_than_round_to_nearest_falls_back(
    tiny_model: Path,
    calibration_text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    layer: int | None,
    spoil: Callable[[nn.Module], None],
) -> None:
    nearest, output = tmp_path / "nearest", tmp_path / "out"
    assert rtn.main(["--model", str(tiny_model), "--output", str(nearest), *GRID_FLAGS]) == 0
    capsys.readouterr()
    arguments = awq_flags(tiny_model, calibration_text, output, "--json")
    assert run_method("spoiling", lambda _: Spoiling(layer, spoil), arguments, {"only": None}) == 0
    printed = capsys.readouterr()
    assert shards(output) == shards(nearest)
    fallen = [0, 1, 2] if layer is None else [layer]
    assert json.loads(printed.out)["layers_fallen_back"] == len(fallen)
    errors = Checkpoint.open(output).layer_errors
    for index in range(3):
        report, loud = errors[f"model.layers.{index}"], f"model.layers.{index}: spoiling error "
        assert report["fallback"] == (index in fallen)
        assert report["error"] == report["rtn_error"]
        assert report["chosen"] == ({} if index in fallen else {"what": "was chosen"})
        assert (loud in printed.err) == (index in fallen)
    assert printed.err.count(": falling back to the latter") == len(fallen)


def test_reported_errors_are_those_of_the_held_out_windows(
    tiny_model: Path, calibration_text: Path, uninterrupted: Path
) -> None:
    """The first layer's errors, computed by plain transformers on the last window."""
    text = load_text(str(calibration_text), "calibration")
    tokens = tokenize(text, AutoTokenizer.from_pretrained(tiny_model))
    window = sample_windows(tokens, SAMPLES, TOKENS, 0)[-1:]
    original = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.inference_mode():
        before, after = original(window, output_hidden_states=True).hidden_states[:2]
        model = dequantized_reference(tiny_model, uninterrupted)
        found = model(window, output_hidden_states=True).hidden_states[1]
    error = float((found - after).square().sum() / (after - before).square().sum())
    report = Checkpoint.open(uninterrupted).layer_errors["model.layers.0"]
    assert report["error"] == pytest.approx(error, rel=1e-4)
    assert 0 < report["error"] < report["rtn_error"]
    assert not report["fallback"]
