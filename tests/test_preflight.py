"""The plan before a run: from headers alone, its budget kept by the whole process, and what does not fit refused."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from offload.errors import ResourceError
from offload.skeleton import build_skeleton
from quant import awq, gptq, rtn
from quant.hidden_states import Spilled, fill, new_states
from quant.preflight import Footprint
from quant.running import CacheRun
from tests.test_walk import contents

ROOT = Path(__file__).parent.parent
FEW = ["--num-samples", "8", "--seq-len", "32", "--group-size", "32"]


def sparse_model(directory: Path, config: LlamaConfig) -> Path:
    """Write a model of a configuration's shapes whose tensors are holes in a file: a header and a size."""
    directory.mkdir()
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in build_skeleton(config, torch.bfloat16).state_dict().items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)
    config.save_pretrained(directory)
    return directory


def llama_70b(directory: Path) -> Path:
    """The shapes of Llama-70B, as `sparse_model`."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        tie_word_embeddings=False,
        max_position_embeddings=8192,
    )
    return sparse_model(directory / "llama-70b", config)


def test_70_billion_parameters_are_planned_from_headers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama_70b(tmp_path)

    def no_data(*arguments: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("offload.source_weights._read", no_data)
    output = tmp_path / "out"
    assert rtn.main(["--model", str(model), "--output", str(output), "--plan", "--cpu-memory", "16GiB"]) == 0
    said = capsys.readouterr().out
    assert "model    llama-70b, LlamaForCausalLM, 80 layers, 131.4 GiB" in said
    assert "method   rtn, int4 symmetric, groups of 128; 560 linears, left alone: 1" in said
    assert "3.6 GiB  the largest layer, in float32 and packed" in said
    assert "3.9 GiB  embeddings or head, before or after the layers" in said
    assert re.search(r"output   \S+out, about 36\.8 GiB; loads here, from \d\.\d GiB of memory on", said)
    assert awq.main(["--model", str(model), "--output", str(output), "--plan", "--cpu-memory", "24GiB"]) == 0
    assert "windows of 512 tokens; their hidden states take 1.0 GiB, " in capsys.readouterr().out
    assert not output.exists()


FOOTPRINT = Footprint(
    runtime_bytes=300 << 20,
    around_bytes=90 << 20,
    layer_bytes=50 << 20,
    method_bytes=20 << 20,
    activation_bytes=30 << 20,
    states_bytes=500 << 20,
    output_bytes=700 << 20,
    seconds=60.0,
)


def test_hidden_states_go_to_disk_before_a_budget_is_refused() -> None:
    whole = (300 + 48 + 100 + 500) << 20
    assert FOOTPRINT.peak_bytes == whole
    assert FOOTPRINT.within(None) is FOOTPRINT
    assert FOOTPRINT.within(whole) == FOOTPRINT
    spilled = FOOTPRINT.within(whole - 1)
    assert spilled == replace(FOOTPRINT, spilled=True)
    assert (spilled.peak_bytes, spilled.disk_bytes) == (448 << 20, 1200 << 20)
    assert FOOTPRINT.disk_bytes == 700 << 20
    assert FOOTPRINT.within(448 << 20) == spilled
    message = (
        r"--cpu-memory 448.0 MiB: too small for this run; at least 448 MiB is needed: 348.0 MiB for Python, torch, "
        r"transformers and a reserve, 90.0 MiB for embeddings or head, before or after the layers, 50.0 MiB for the "
        r"largest layer, in float32 and packed, 20.0 MiB for statistics and searches, 30.0 MiB for activations$"
    )
    with pytest.raises(ResourceError, match=message):
        FOOTPRINT.within((448 << 20) - 1)


def test_measuring_sensitivity_comes_first_and_has_its_own_peak() -> None:
    small, large = (replace(FOOTPRINT, sensitivity_bytes=size << 20) for size in (600, 601))
    assert small.peak_bytes == FOOTPRINT.peak_bytes
    assert large.peak_bytes == FOOTPRINT.peak_bytes + (1 << 20)
    assert replace(large, spilled=True).peak_bytes == large.peak_bytes
    assert ("measuring sensitivity, before that", 601 << 20) in large.parts()


def test_the_run_of_the_result_for_its_cache_has_its_own_peak_and_takes_what_a_budget_leaves() -> None:
    run = CacheRun(16, least_bytes=100 << 20, most_bytes=900 << 20, given_bytes=900 << 20, layers_bytes=5, operations=0)
    needed = replace(FOOTPRINT, cache_run=run)
    assert (needed.peak_bytes, run.read_bytes) == ((300 + 900) << 20, 5)
    assert needed.within(1200 << 20) == needed
    for budget_mib, spilled in ((1199, False), (948, False), (947, True), (450, True)):
        fitted = needed.within(budget_mib << 20)
        assert (fitted.peak_bytes, fitted.spilled) == (budget_mib << 20, spilled)
        assert fitted.cache_run is not None
        assert fitted.cache_run.read_bytes == 16 * 5
        assert ("running the result for its cache, after that", (budget_mib - 300) << 20) in fitted.parts()
    assert needed.smallest_mib == 448
    hungry = replace(needed, cache_run=replace(run, least_bytes=200 << 20))
    assert hungry.smallest_mib == 500
    assert hungry.within(500 << 20).peak_bytes == 500 << 20
    with pytest.raises(ResourceError, match=r"--kv runs the result, which takes 500\.0 MiB; leave --kv away"):
        hungry.within((500 << 20) - 1)


def test_a_budget_too_small_for_sensitivity_is_refused_before_it_is_measured(
    tiny_model: Path,
    calibration_text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("quant.pipeline.widen", lambda *_: pytest.fail("sensitivity was measured"))
    arguments = ["--model", str(tiny_model), "--output", str(tmp_path / "out"), "--calibration", str(calibration_text)]
    assert gptq.main([*arguments, *FEW, "--target-bits", "6", "--cpu-memory", "100MiB"]) == 4
    assert re.search(r"at least \d+ MiB is needed: .* for measuring sensitivity, before that", capsys.readouterr().err)


def test_the_smallest_budget_that_an_error_names_is_taken(
    tiny_model: Path, calibration_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(tiny_model), "--output", str(tmp_path / "out"), "--calibration", str(calibration_text)]
    assert awq.main([*arguments, *FEW, "--cpu-memory", "100MiB"]) == 4
    error = capsys.readouterr().err
    smallest = re.search(r"at least (\d+) MiB is needed", error)
    assert smallest is not None, error
    assert not (tmp_path / "out").exists()
    margin = 32  # this process is a test's, and may have grown since
    assert awq.main([*arguments, *FEW, "--cpu-memory", f"{int(smallest[1]) + margin}MiB"]) == 0


@pytest.mark.parametrize("method", [awq, gptq])
def test_a_run_with_hidden_states_on_disk_gives_the_same_bytes(
    method: Any, tiny_model: Path, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    within = Footprint.within
    results = []
    for spilled in (False, True):
        monkeypatch.setattr(
            Footprint, "within", lambda self, budget, on=spilled: replace(within(self, budget), spilled=on)
        )
        output = tmp_path / str(spilled) / "out"
        arguments = ["--model", str(tiny_model), "--output", str(output), "--calibration", str(calibration_text)]
        assert method.main([*arguments, *FEW]) == 0
        results.append(contents(output))
    assert results[0] == results[1]


def test_spilled_states_are_those_of_memory(tmp_path: Path) -> None:
    batches = torch.randn(7, 5, 6).split(2)
    like = batches[0][:1]
    spilled, held = (fill(new_states(7, like, directory), batches) for directory in (tmp_path, None))
    assert isinstance(spilled, Spilled)
    assert isinstance(held, torch.Tensor)
    assert not list(tmp_path.iterdir())
    for part in (slice(0, 7), slice(0, 1), slice(3, 7), slice(5, 99), slice(2, 2)):
        assert len(spilled[part]) == len(held[part])
        for found, expected in zip(spilled[part].split(3), held[part].split(3), strict=part != slice(2, 2)):
            assert torch.equal(found, expected)
    assert torch.equal(next(spilled[3:7][1:2].split(1)), held[4:5])


def test_a_disk_without_room_for_hidden_states(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"4096.0 TiB for hidden states cannot be had on that disk \("):
        new_states(1 << 20, torch.empty(1, 1 << 20, 1 << 10), tmp_path)


TWICE = """
import contextlib, io, re, sys
from quant.{method} import main
said = io.StringIO()
with contextlib.redirect_stderr(said):
    assert main([*sys.argv[1:], "--cpu-memory", "1MiB"]) == 4
smallest = int(re.search(r"at least (\\d+) MiB is needed", said.getvalue())[1])
assert main([*sys.argv[1:], "--cpu-memory", f"{{smallest + {room_mib}}}MiB", "--json"]) == 0
print(smallest + {room_mib})
"""


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("awq", []),
        pytest.param("rtn", [], marks=pytest.mark.slow),
        pytest.param("gptq", [], marks=pytest.mark.slow),
        pytest.param("gptq", ["--target-bits", "6"], marks=pytest.mark.slow),
        pytest.param("awq", ["--kv", "int8"], marks=pytest.mark.slow),
        pytest.param("gptq", ["--tier", "fast", "--pass-dtype", "bfloat16"], marks=pytest.mark.slow),
    ],
)
def test_the_whole_process_stays_within_the_plan(
    method: str, more: list[str], tiny_model: Path, calibration_text: Path, tmp_path: Path
) -> None:
    """A model so small that nearly all of it is Python and libraries, within the smallest budget and 2 MiB."""
    flags = [] if method == "rtn" else ["--calibration", str(calibration_text), *FEW]
    arguments = ["--model", str(tiny_model), "--output", str(tmp_path / "out"), *flags, *more]
    command = [sys.executable, "-c", TWICE.format(method=method, room_mib=2), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result, budget_mib = done.stdout.splitlines()
    assert json.loads(result)["peak_memory_bytes"] <= int(budget_mib) << 20
