"""Layers that go to a device in parts: which parts, by family, and the same bits from all of them, on a fake."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_device import FakeDevice, fake_gpu
from test_architectures import FAMILIES, make_model, quantize
from test_device import passes, same
from test_plan import DESKTOP
from test_recovery import Full, check_memory
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from offload import generate, plan
from offload.errors import ResourceError
from offload.executor import executor_of, load
from offload.formats.convert import opened
from offload.layer_view import SHAPE
from offload.limit import bytes_by_link
from offload.planning import machine, trial
from offload.planning.arrangement import arranged
from offload.planning.placement import Placement

pytestmark = pytest.mark.timeout(120)

GATED = ["self_attn", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
PARTS: dict[str, list[str]] = {
    "Gemma2": GATED,
    "Phi3": ["self_attn", "mlp.gate_up_proj", "mlp.down_proj"],
    "GPTNeoX": ["attention.query_key_value", "attention.dense", "mlp"],
    "OPT": [*(f"self_attn.{name}_proj" for name in ("k", "v", "q", "out")), "fc1", "fc2"],
    "Falcon with alibi": ["self_attention", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
    "Bert": ["attention.self", "attention.output", "intermediate", "output"],
    "Mixtral": ["self_attn", "mlp"],
    "DeepseekV3": ["self_attn", "mlp.experts", "mlp.shared_experts"],
}
"""Of the last layer. In so small models attention may be more than half of it."""

SHORT = 16
"""Tokens of context, whose keys and values are small beside a layer."""


@pytest.fixture(autouse=True)
def _modules_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused step rounds in another way than the modules of layers on a GPU."""
    monkeypatch.setattr("offload.streaming.fuse", lambda *_: 0)


@pytest.fixture(scope="module")
def wide(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the tiny model, with an MLP so wide that pages matter little; not quantized."""
    directory = tmp_path_factory.mktemp("wide") / "model"
    shutil.copytree(tiny_model, directory)
    torch.manual_seed(3)
    config = LlamaConfig.from_pretrained(tiny_model, intermediate_size=512)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def wide_int4(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize("rtn", wide, wide, tmp_path_factory.mktemp("wide") / "int4").directory


@pytest.fixture
def expected(wide_int4: Path) -> list[Tensor]:
    return passes(load(wide_int4))


def placements(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> list[Placement]:
    """Return placements of a checkpoint on a GPU, by name, through one slot."""
    with fake_gpu(monkeypatch):
        model = load(checkpoint, n_gpu_layers=-1, context_tokens=SHORT)
        found = [arranged(executor_of(model).placement, name, 1) for name in names]
        executor_of(model).close()
    return found


@pytest.mark.parametrize("kind", PARTS)
def test_every_family_has_its_parts_and_equals_the_resident_model(
    kind: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = quantize("rtn", make_model(kind, tiny_model, tmp_path / "model"), tmp_path, tmp_path / "out").directory
    expected = passes(load(checkpoint))
    with fake_gpu(monkeypatch) as device:
        model = load(checkpoint, n_gpu_layers=-1, poison=True)
        executor = executor_of(model)
        for layer, split in zip(executor.units.layers, executor.units.split, strict=True):
            held = [name for blob in (*split.parts, split.rest) if blob is not None for name in blob.tensors]
            assert sorted(held) == sorted(layer.tensors)
            assert not any(name.endswith(SHAPE) for part in split.parts for name in part.tensors)
        *_, last = executor.units.split
        assert [part.module.removeprefix(f"{executor.blobs[-1].module}.") for part in last.parts] == PARTS[kind]
        for name, slots in (("staged in parts", 1), ("disk to staged in parts", 2)):
            with torch.inference_mode(False), torch.no_grad():
                executor.rearrange(arranged(executor.placement, name, slots))
            parts = sum(len(layer.parts) for layer in executor.units.split)
            for _ in range(2):  # the first pass learns in which order the parts are used
                assert same(passes(model), expected)
            copies, reads = device.copies, executor.stats.layer_reads
            assert same(passes(model), expected)
            assert abs(device.copies - copies - 3 * parts) <= slots  # some are under way, at the one end or the other
            if "disk" in name:
                assert abs(executor.stats.layer_reads - reads - 3 * parts) <= 2 * slots
        executor.close()


def test_a_layer_without_two_modules_of_weight_is_refused_as_one(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-OSS keeps its experts in one tensor, beside which its attention, here, is small."""
    monkeypatch.setitem(FAMILIES, "GptOss", {"num_local_experts": 8, "head_dim": 16, "sliding_window": 8})
    model = make_model("GptOss", tiny_model, tmp_path / "model")
    checkpoint = quantize("rtn", model, tmp_path, tmp_path / "out").directory
    (whole,) = placements(checkpoint, monkeypatch, "staged in parts")
    assert whole.needs.split is None
    assert not whole.split
    with (
        fake_gpu(monkeypatch),
        pytest.raises(ResourceError, match=r"too small for this model; at least .* for layers$"),
    ):
        load(checkpoint, gpu_memory=whole.device_bytes - 2 * max(whole.needs.layers_bytes), context_tokens=SHORT)


def test_parts_are_chosen_only_where_nothing_whole_fits(
    wide_int4: Path, expected: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, in_parts = placements(wide_int4, monkeypatch, "staged", "staged in parts")
    assert in_parts.device_bytes < whole.device_bytes
    for budget, split in ((whole.device_bytes, False), (in_parts.device_bytes, True)):
        with fake_gpu(monkeypatch, FakeDevice(eager=split)):
            model = load(wide_int4, gpu_memory=budget, context_tokens=SHORT, poison=True)
            placement = executor_of(model).placement
            assert placement.split == split
            assert placement.device_bytes <= budget
            assert same(passes(model), expected)
            executor_of(model).close()


def test_a_gpu_that_nobody_asked_for_is_left_out_before_layers_are_cut(
    wide_int4: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (in_parts,) = placements(wide_int4, monkeypatch, "staged in parts")
    with fake_gpu(monkeypatch) as device:
        device.total_bytes = in_parts.device_bytes
        model = load(wide_int4, device_map="auto", context_tokens=SHORT)
        assert executor_of(model).device_side is None
        model = load(wide_int4, gpu_memory=in_parts.device_bytes, context_tokens=SHORT)
        assert executor_of(model).placement.split
        executor_of(model).close()


def test_what_was_not_quantized_is_cut_as_well(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    checkpoint = opened(wide, plain=True)
    expected = passes(load(checkpoint, dtype=torch.float16))
    with fake_gpu(monkeypatch) as device:
        model = load(checkpoint, n_gpu_layers=-1, poison=True, dtype=torch.float16)
        executor = executor_of(model)
        assert [len(layer.parts) for layer in executor.units.split] == [4] * 3
        with torch.inference_mode(False), torch.no_grad():
            executor.rearrange(arranged(executor.placement, "staged in parts", 2))
        assert same(passes(model), expected)
        assert device.copies
        executor.close()


def test_a_full_gpu_with_one_slot_goes_on_with_parts(
    wide_int4: Path, expected: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole,) = placements(wide_int4, monkeypatch, "staged")
    with fake_gpu(monkeypatch) as device:
        model = load(wide_int4, n_gpu_layers=-1, context_tokens=SHORT, poison=True)
        executor = executor_of(model)
        with torch.inference_mode(False), torch.no_grad():
            executor.rearrange(whole)
        full = Full(executor.layers[1].mlp.up_proj, 2)
        assert same(passes(model), expected)
        assert full.calls > full.nth
        assert executor.placement.split
        assert executor.placement.device_bytes < whole.device_bytes
        check_memory(model, device)
        executor.close()


def test_the_commands_say_it(
    wide_int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The plan is tried in this process: the faked device would be gone in another one."""
    whole, in_parts = placements(wide_int4, monkeypatch, "staged", "staged in parts")
    figures = replace(DESKTOP, device_runtime_bytes=whole.needs.device_runtime_bytes)
    monkeypatch.setattr(machine, "cache_directory", lambda: tmp_path)
    monkeypatch.setattr(trial, "run_measurement", lambda directory: figures)
    monkeypatch.setattr(trial, "run_trial", trial.run_trial_here)
    budget = (whole.device_bytes + in_parts.device_bytes) // 2
    flags = ["--model", str(wide_int4), "--gpu-memory", str(budget)]
    slot = "one slot: no part of a layer is copied while another is computed"
    with fake_gpu(monkeypatch):
        assert plan.main([*flags, "--context", str(SHORT)]) == 0
        assert slot in capsys.readouterr().out
        assert plan.main([*flags, "--context", str(SHORT), "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["layers_in_parts"]
        assert min(value for value in report["confirmation"].values() if value is not None) > 0
        assert generate.main([*flags, "--prompt", "The fox", "--max-new-tokens", str(SHORT - len("The fox"))]) == 0
        said = capsys.readouterr().err
        assert slot in said
        assert "of the bus's" in said


def test_a_plan_cuts_no_layer_for_a_gpu_that_nobody_asked_for(
    wide_int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (in_parts,) = placements(wide_int4, monkeypatch, "staged in parts")
    figures = replace(DESKTOP, device_runtime_bytes=in_parts.needs.device_runtime_bytes)
    figures = replace(figures, device_memory_bytes=in_parts.device_bytes)
    monkeypatch.setattr(machine, "cache_directory", lambda: tmp_path)
    monkeypatch.setattr(trial, "run_measurement", lambda directory: figures)
    flags = ["--model", str(wide_int4), "--context", str(SHORT), "--no-confirm"]
    assert plan.main([*flags, "--device-map", "auto"]) == 4
    assert capsys.readouterr().err.endswith(" for layers\n")
    assert plan.main([*flags, "--gpu-memory", str(in_parts.device_bytes)]) == 0
    assert "no part of a layer is copied while another is computed" in capsys.readouterr().out


def test_what_was_tried_is_what_was_placed(wide_int4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, in_parts = placements(wide_int4, monkeypatch, "staged", "staged in parts")
    assert trial.Trial.of(in_parts, [], None, joint=False).placed(whole) == in_parts


def test_one_pass_copies_what_the_bus_is_said_to_carry(wide_int4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token: dict[str, Any] = {"input_ids": torch.tensor([[7]])}
    with fake_gpu(monkeypatch), torch.no_grad():
        model = load(wide_int4, n_gpu_layers=-1)
        executor = executor_of(model)
        executor.rearrange(arranged(executor.placement, "staged in parts", 2))
        side = executor.device_side
        assert side is not None
        model(**token)
        before = side.layer_copies.copied_bytes
        model(**token)
        in_parts = side.layer_copies.copied_bytes - before
        assert in_parts == bytes_by_link(executor)["bus"]
        assert in_parts == sum(part.nbytes for layer in executor.units.split for part in layer.parts)
        executor.close()
