"""`offload.plan`: trials give back what they were made with, and a plan says what it predicts, for what, and why."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from fake_device import fake_gpu

from kernels.cpu_matmul import cpu_backend
from offload.checkpoint import Checkpoint
from offload.errors import ResourceError
from offload.plan import main
from offload.planning import machine, rehearsal, trial
from offload.planning.choice import plan
from offload.planning.costs import Overheads, Shape, decode_costs, model_key, prefill_costs
from offload.planning.forecast import START_TOKENS
from offload.planning.machine import DiskRate, Machine, load_cache, save_json
from offload.planning.needs import Needs
from offload.planning.predict import Costs, Tier, walk
from offload.planning.rehearsal import rehearse
from offload.planning.timing import Timing
from offload.planning.trial import Trial, run_trial
from offload.planning.wishes import Wishes, WishWords

MIB = 1 << 20
COUNT = 24
SHAPE = Shape((40 * MIB,) * COUNT, (80_000_000,) * COUNT, cache_bytes_per_token=4096.0, head_bytes=100 * MIB)
NEEDS = Needs(450 * MIB, 100 * MIB, 50 * MIB, 20 * MIB, SHAPE.layers_bytes)
FIGURES = Machine(
    description="invented",
    date="2026-01-01",
    read_bytes_per_second=20e9,
    kernel_bytes_per_second=16e9,
    kernel_operations_per_second=1e12,
    disk_bytes_per_second=6e9,
    disk_seconds_per_read=1e-4,
    interference=0.25,
)
TRUE = Overheads(
    layer_seconds=9e-4,
    streamed_seconds=15e-4,
    outside_seconds=4e-3,
    context_seconds=2e-6,
    prefill_seconds=1e-4,
    reading_share=0.8,
    kept=COUNT,
    streamed=COUNT,
    joint=True,
)
DRIFT = 0.6
"""Of the disk's rate, what it has while trials run."""
DESKTOP = replace(
    FIGURES,
    description="a desktop",
    copy_bytes_per_second=25e9,
    mapped_bytes_per_second=20e9,
    device_bytes_per_second=800e9,
    device_operations_per_second=1e14,
    device_memory_bytes=24 << 30,
    device_runtime_bytes=500 << 20,
)


class InventedMachine:
    """Answers trials with what a pass takes where TRUE holds, and the disk has become slower."""

    def __init__(self) -> None:
        self.words: list[WishWords] = []

    def __call__(
        self, directory: Path, words: WishWords, prompts: Sequence[int], *, context_tokens: int, **_: Any
    ) -> Trial:
        self.words.append(words)
        layers = [f"layers.{index}" for index in range(COUNT)]
        placement = plan(NEEDS, Wishes.of(words).on(layers, layers))
        timings = [self._timing(placement.tiers, placement.depth, prompt) for prompt in prompts]
        disk = self.disk if placement.depth else None
        return Trial(placement.tiers, placement.depth, tuple(timings), disk, joint=TRUE.joint)

    disk = DiskRate(DRIFT * FIGURES.disk_bytes_per_second, FIGURES.disk_seconds_per_read)

    def _timing(self, tiers: tuple[Tier, ...], depth: int, prompt: int) -> Timing:
        figures = FIGURES.with_disk(self.disk)
        costs = decode_costs(SHAPE, figures, TRUE, prompt + 8)
        decoded = walk(tiers, costs, depth)
        filled = walk(tiers, prefill_costs(SHAPE, figures, TRUE, prompt), depth)
        layer = costs.host_seconds[0]
        return Timing(
            prompt_tokens=prompt,
            context_tokens=prompt + 8,
            step_seconds=decoded.seconds,
            inside_seconds=decoded.seconds - costs.outside_seconds,
            wait_seconds=decoded.wait_seconds,
            prefill_seconds=filled.seconds,
            prefill_wait_seconds=filled.wait_seconds,
            kept_seconds=layer if "host" in tiers else 0.0,
            streamed_seconds=layer + costs.streamed_seconds if "disk" in tiers else 0.0,
            bytes_read_per_second=TRUE.reading_share * self.disk.bytes_per_second if "disk" in tiers else 0.0,
        )


def test_a_trial_gives_back_what_the_machine_was_made_with(monkeypatch: pytest.MonkeyPatch) -> None:
    invented = InventedMachine()
    monkeypatch.setattr(rehearsal, "run_trial", invented)
    budget = NEEDS.around_bytes + 16 * 40 * MIB
    found = rehearse(Path(), SHAPE, FIGURES, {"cpu_memory": budget}, 2048)
    assert invented.words == [{"cpu_memory": budget}]
    assert found.reading_share == pytest.approx(TRUE.reading_share)
    assert (found.kept, found.streamed, found.joint) == (13, 11, True)
    for budget in (None, *(NEEDS.around_bytes + layers * 40 * MIB for layers in range(1, COUNT))):
        for context in (START_TOKENS, 2048):
            expected, predicted = (decode_costs(SHAPE, FIGURES, known, context) for known in (TRUE, found))
            placement = plan(NEEDS, budget, expected)
            assert placement.seconds(predicted) == pytest.approx(placement.seconds(expected), rel=0.05)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_budget_that_keeps_no_layer_is_rehearsed_on_what_it_streams(
    monkeypatch: pytest.MonkeyPatch, layers: int
) -> None:
    monkeypatch.setattr(rehearsal, "run_trial", InventedMachine())
    budget = NEEDS.around_bytes + layers * 40 * MIB
    found = rehearse(Path(), SHAPE, FIGURES, {"cpu_memory": budget}, 2048)
    assert (found.kept, found.streamed) == (0, COUNT)
    costs = decode_costs(SHAPE, FIGURES, TRUE, START_TOKENS)
    placement = plan(NEEDS, budget, costs)
    predicted = placement.seconds(decode_costs(SHAPE, FIGURES, found, START_TOKENS))
    assert predicted == pytest.approx(placement.seconds(costs), rel=0.01)
    with pytest.raises(ResourceError, match="too small"):
        rehearse(Path(), SHAPE, FIGURES, {"cpu_memory": NEEDS.around_bytes}, 2048)


def test_a_rehearsal_keeps_what_an_earlier_one_knows_from_more_layers() -> None:
    resident = replace(TRUE, layer_seconds=1.0, streamed_seconds=1.0, reading_share=1.0, kept=24, streamed=0)
    streaming = replace(TRUE, layer_seconds=2.0, streamed_seconds=3.0, reading_share=0.5, kept=4, streamed=20)
    assert streaming.over(resident) == resident.over(streaming) == replace(streaming, layer_seconds=1.0, kept=24)
    assert streaming.over(Overheads()) == streaming
    on_gpu = Overheads(outside_seconds=1.0)  # has seen no layer on the host
    assert on_gpu.over(streaming).joint
    assert not on_gpu.over(Overheads()).joint


def test_a_trial_runs_in_its_own_process(tiny_checkpoint: Path) -> None:
    costs = Costs((1e-3,) * 3, (1e-3,) * 3)
    found = run_trial(tiny_checkpoint, {"device_map": "disk", "slots": 2}, (8, 40), context_tokens=64, costs=costs)
    assert (found.tiers, found.depth) == (("disk",) * 3, 2)
    assert found.joint == (cpu_backend() != "torch")
    assert [timing.prompt_tokens for timing in found.timings] == [8, 40]
    for timing in found.timings:
        assert timing.prompt_tokens < timing.context_tokens < 64
        assert 0 < timing.computing_seconds < timing.inside_seconds < timing.step_seconds
        assert timing.prefill_seconds > timing.prefill_wait_seconds
        assert timing.kept_seconds == 0
        assert 0 < 3 * timing.streamed_seconds < timing.inside_seconds
        assert timing.bytes_read_per_second > 0
    assert found.disk is not None
    assert found.disk.bytes_per_second > 0
    with pytest.raises(ResourceError, match=r"^--cpu-memory 10.0 MiB: too small for this model; at least \d+ MiB"):
        run_trial(tiny_checkpoint, {"cpu_memory": "10MiB"}, (8,), context_tokens=64)


@pytest.fixture
def invented_cache(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine and a rehearsal that are in the cache already."""
    monkeypatch.setattr(machine, "cache_directory", lambda: tmp_path)
    path = machine.cache_file(tiny_checkpoint)
    key = model_key(Checkpoint.open(tiny_checkpoint))
    save_json(path, {"machine": asdict(FIGURES), "models": {key: TRUE.to_json()}})
    return path


def test_a_plan_in_words(invented_cache: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(tiny_checkpoint), "--context", "100", "--no-confirm"]) == 0
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert lines[:2] == [
        "machine  invented, measured 2026-01-01",
        "  memory 20.0 GB/s, int4 product 16.0 GB/s, disk 6.0 GB/s",
    ]
    assert lines[-6:-4] == ["layers", "  host     0-2"]
    assert lines[-4] == "predicted"
    assert re.fullmatch(r"  decode +147\.\d tokens/s at the start, 13\d\.\d with 100 tokens before", lines[-3])
    assert re.fullmatch(r"  prefill +\d+\.\d tokens/s", lines[-2])
    assert re.fullmatch(r"  bound by what surrounds the products: without it a token would take 9\d% less", lines[-1])
    assert output.err == ""


def test_a_picture_is_written_or_it_is_said_why_not(
    invented_cache: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", str(tiny_checkpoint), "--context", "100", "--no-confirm", "--picture"]
    assert main([*flags, str(tmp_path / "plan.svg")]) == 0
    assert capsys.readouterr().err == f"{tmp_path / 'plan.svg'} written\n"
    assert f">{tiny_checkpoint.name}</text>" in (tmp_path / "plan.svg").read_text()
    assert main([*flags, str(tmp_path / "missing" / "plan.svg")]) == 4
    assert "plan.svg: cannot be written (No such file or directory)" in capsys.readouterr().err


def test_a_plan_for_a_budget_says_what_would_help(
    invented_cache: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", str(tiny_checkpoint), "--context", "100", "--no-confirm", "--json", "--device-map"]
    assert main([*flags, '{"": "cpu", "model.layers.1": "disk"}']) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["tiers"] == ["host", "disk", "host"]
    assert report["hypothetical"] is None
    assert report["confirmation"] is None
    assert list(report["prediction"]["help"]) == ["a disk twice as fast"]
    assert 1 <= report["prediction"]["help"]["a disk twice as fast"] < 1.2


def test_a_plan_is_confirmed_by_what_was_loaded(
    invented_cache: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    timings = tuple(Timing(n, n + 8, 0.1, 0.09, 0.0, 2.0, 0.0) for n in (START_TOKENS, 90))
    slow = DiskRate(1e6, 0.01)
    monkeypatch.setattr(trial, "run_trial", lambda *_, **__: Trial(("disk",) * 3, 3, timings, slow))
    assert main(["--model", str(tiny_checkpoint), "--context", "100"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3] == "confirmed by a run"
    decode = r"  decode +10\.0 tokens/s; predicted \d+\.\d, \d+% over it; (\d\.\d) with the disk as it was right after"
    assert re.fullmatch(decode, lines[-2])
    assert re.fullmatch(r"  prefill +45\.0 tokens/s; predicted \d+\.\d, \d+% over it", lines[-1])


def test_a_plan_that_reads_from_disk_times_it_as_it_is_now(
    invented_cache: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "disk_rate", lambda blobs: DiskRate(123e6, 0.004))
    timings = tuple(Timing(n, n + 8, 0.1, 0.09, 0.0, 2.0, 0.0) for n in (START_TOKENS, 90))
    monkeypatch.setattr(trial, "run_trial", lambda *_, **__: Trial(("disk",) * 3, 3, timings))
    rates = []
    for device_map in ("disk", "cpu"):
        assert main(["--model", str(tiny_checkpoint), "--context", "100", "--json", "--device-map", device_map]) == 0
        rates.append(json.loads(capsys.readouterr().out)["machine"]["disk_bytes_per_second"])
    assert rates == [123e6, FIGURES.disk_bytes_per_second]


def test_what_is_measured_once_is_cached(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "cache_directory", lambda: tmp_path)
    monkeypatch.setattr(trial, "run_measurement", lambda directory: FIGURES)
    monkeypatch.setattr(rehearsal, "rehearse", lambda *_: TRUE)
    timings = tuple(Timing(n, n + 8, 0.1, 0.09, 0.0, 2.0, 0.0) for n in (START_TOKENS, 90))
    monkeypatch.setattr(trial, "run_trial", lambda *_, **__: Trial(("host",) * 3, 0, timings))
    saved = tmp_path / "saved.json"
    flags = ["--model", str(tiny_checkpoint), "--context", "100", "--save-machine", str(saved)]
    said = []
    for more in ([], [], ["--remeasure"]):
        assert main([*flags, *more]) == 0
        said.append(capsys.readouterr().err.splitlines())
    both = ["measuring this machine, once", "rehearsing the model on it, once"]
    assert said == [both, [], both]
    assert Machine.from_json(json.loads(saved.read_text())) == FIGURES
    assert list(load_cache(machine.cache_file(tiny_checkpoint))["models"].values()) == [TRUE.to_json()]


def test_a_plan_for_another_machine_is_called_hypothetical(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "cache_directory", lambda: tmp_path)
    path = tmp_path / "desktop.json"
    save_json(path, asdict(DESKTOP))
    flags = ["--model", str(tiny_checkpoint), "--context", "100", "--machine", str(path), "--n-gpu-layers", "2"]
    assert main(flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"hypothetical: a machine of {path} (a desktop), not this one"
    assert "  GPU memory 800.0 GB/s, copied to it 25.0 GB/s, read by it 20.0 GB/s" in lines
    assert "on the GPU" in lines
    assert "predicted from the links alone, as the model was not rehearsed" in lines
    assert main([*flags, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["tiers"].count("resident") == 2
    assert report["device_budget_bytes"] == 24 << 30


@pytest.mark.parametrize(
    ("flags", "tiers"),
    [
        (["--device-map", "auto"], {"resident"}),
        (["--device-map", "sequential"], {"resident"}),
        (["--n-gpu-layers", "1"], {"resident", "staged"}),
    ],
)
def test_a_plan_with_a_gpu_is_tried_as_it_was_planned_and_not_rehearsed(
    flags: list[str],
    tiers: set[str],
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a device that is faked, in this process: it would be gone in another one."""
    monkeypatch.setattr(machine, "cache_directory", lambda: tmp_path)
    monkeypatch.setattr(trial, "run_measurement", lambda directory: DESKTOP)
    monkeypatch.setattr(rehearsal, "rehearse", lambda *_: pytest.fail("rehearsed"))
    tried: list[Trial] = []

    def run_trial(directory: Path, words: WishWords, prompts: Sequence[int], **more: Any) -> Trial:
        tried.append(trial.run_trial_here(directory, words, prompts, **more))
        return tried[-1]

    monkeypatch.setattr(trial, "run_trial", run_trial)
    with fake_gpu(monkeypatch):
        assert main(["--model", str(tiny_checkpoint), "--context", "100", *flags, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["tiers"]) == tiers
    found = tried[0]
    assert (list(found.tiers), found.way, found.device_depth) == (
        report["tiers"],
        report["way_from_disk"],
        report["device_slots"],
    )
    assert report["device_budget_bytes"] == 24 << 30
    assert report["confirmation"].pop("decode_predicted_after") is None
    assert min(report["confirmation"].values()) > 0


def test_a_rehearsal_that_kept_few_layers_does_for_plans_that_keep_few(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "cache_directory", lambda: tmp_path)
    monkeypatch.setattr(trial, "run_measurement", lambda directory: FIGURES)
    monkeypatch.setattr(rehearsal, "rehearse", lambda *_: replace(TRUE, kept=0))
    timings = tuple(Timing(n, n + 8, 0.1, 0.09, 0.0, 2.0, 0.0) for n in (START_TOKENS, 90))
    monkeypatch.setattr(trial, "run_trial", lambda *_, **__: Trial(("disk",) * 3, 1, timings))
    said = []
    for device_map in ("disk", "disk", "cpu"):
        assert main(["--model", str(tiny_checkpoint), "--context", "100", "--device-map", device_map]) == 0
        said.append(capsys.readouterr().err.splitlines())
    again = "rehearsing the model on it, once"
    assert said == [["measuring this machine, once", again], [], [again]]


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--context", "0"], 2, "--context 0: expected at least 1"),
        (["--context", "600"], 2, "--context 600: the model takes 512 tokens at most"),
        (["--batch", "0"], 2, "--batch 0: expected at least 1"),
        (
            ["--gpu-memory", "8GiB"],
            4,
            "--gpu-memory 8.0 GiB: no CUDA device here; leave it out, or plan for a machine that has one with "
            "--machine FILE",
        ),
        (["--gpu-memory", "1GiB", "--max-memory", "0=2GiB"], 2, "--gpu-memory and --max-memory: both are a budget"),
        (["--cpu-memory", "10MiB"], 4, "--cpu-memory 10.0 MiB: too small for this model; at least "),
    ],
)
def test_refusals(
    invented_cache: Path,
    tiny_checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    status: int,
    message: str,
) -> None:
    context = [] if "--context" in flags else ["--context", "100"]
    assert main(["--model", str(tiny_checkpoint), *context, *flags]) == status
    assert capsys.readouterr().err.startswith(f"error: {message}")
