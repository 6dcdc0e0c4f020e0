"""Perplexity against a plain computation, its protocol and its record; the table of two checkpoints."""

import csv
import hashlib
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from eval import compare, ppl
from eval.likelihood import Divergence, Protocol, measure, standard_error
from eval.ppl import Perplexity, load_for_evaluation, record, strict_json
from offload.checkpoint import Checkpoint
from offload.errors import InputError
from offload.kv.cache import use_int8_attention
from offload.text import load_text, tokenize

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def tokens(tiny_model: Path, calibration_text: Path) -> Tensor:
    return tokenize(load_text(str(calibration_text), "evaluation"), AutoTokenizer.from_pretrained(tiny_model))


@pytest.fixture(scope="module")
def original(tiny_model: Path) -> PreTrainedModel:
    return load_for_evaluation(tiny_model, "exact")[0]


@torch.inference_mode()
def plain_nlls(
    model: PreTrainedModel, tokens: Tensor, window: int, stride: int, limit: int | None
) -> list[list[float]]:
    """Return, window by window, the nll of each scored token, by log-probabilities in float64 picked one at a time."""
    scored = []
    start = 0
    while start + window <= len(tokens) and (limit is None or len(scored) < limit):
        part = tokens[start : start + window]
        log_probabilities = model(part[None], use_cache=False).logits[0].double().log_softmax(-1)
        nlls = [-float(log_probabilities[i - 1, int(part[i])]) for i in range(1, window)]
        seen = max(0, window - stride) if start else 0
        scored.append([nlls[i - 1] for i in range(max(1, seen), window)])
        start += stride
    return scored


PROTOCOLS = [(64, 64, 5), (64, 16, 6), (33, 33, None), (300, 100, 4), (512, 512, 2), (2, 1, 9), (7, 6, 9)]


@pytest.mark.parametrize(("window", "stride", "limit"), PROTOCOLS)
def test_it_equals_the_plain_computation(
    original: PreTrainedModel, tokens: Tensor, window: int, stride: int, limit: int | None
) -> None:
    expected = plain_nlls(original, tokens[:1100], window, stride, limit)
    means, counts = measure(original, tokens[:1100], Protocol(window, stride, limit), "tiny")
    assert counts == [len(nlls) for nlls in expected]
    assert means == pytest.approx([float(np.mean(nlls)) for nlls in expected], rel=1e-5)
    assert max(means) - min(means) > 1e-3


def test_overlapping_windows_score_every_token_once(original: PreTrainedModel, tokens: Tensor) -> None:
    """With a stride, each token after the first is scored in exactly one window."""
    _, counts = measure(original, tokens[:320], Protocol(64, 32, None), "tiny")
    assert sum(counts) == 319
    _, counts = measure(original, tokens[:320], Protocol(64, 64, None), "tiny")
    assert sum(counts) == 320 - 5


def full_passes(model: PreTrainedModel) -> list[None]:
    """Return a list that grows with every forward pass that makes logits of all positions."""
    passes: list[None] = []
    model.register_forward_hook(lambda *arguments: passes.append(None))
    return passes


def test_a_head_that_is_all_is_given_a_few_positions_at_a_time(
    tiny_model: Path, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load_for_evaluation(tiny_model, "exact")
    expected = plain_nlls(model, tokens, 200, 200, 3)
    passes, rows = full_passes(model), []
    monkeypatch.setattr("eval.likelihood._HEAD_CHUNK_TOKENS", 48)
    model.get_output_embeddings().register_forward_hook(lambda head, x, y: rows.append(y.shape[-2]))
    means, _ = measure(model, tokens, Protocol(200, 200, 3), "tiny")
    assert means == pytest.approx([float(np.mean(nlls)) for nlls in expected], rel=1e-5)
    assert len(passes) == 1
    assert rows[-5:] == [48, 48, 48, 48, 7]


def test_a_soft_cap_on_the_logits_is_not_left_out(tokens: Tensor) -> None:
    config = Gemma2Config(
        vocab_size=264,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        final_logit_softcapping=1.5,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=0,
        bos_token_id=None,
    )
    model = Gemma2ForCausalLM(config).eval()
    expected = [float(np.mean(nlls)) for nlls in plain_nlls(model, tokens, 64, 32, 5)]
    passes = full_passes(model)
    means, _ = measure(model, tokens, Protocol(64, 32, 5), "capped")
    assert means == pytest.approx(expected, rel=1e-5)
    assert len(passes) == 1 + 5
    model.config.final_logit_softcapping = None
    uncapped, _ = measure(model, tokens, Protocol(64, 32, 5), "uncapped")
    assert abs(uncapped[0] - means[0]) > 0.1


def test_a_checkpoint_is_measured_through_the_executor(tiny_checkpoint: Path, tokens: Tensor) -> None:
    model, backend = load_for_evaluation(tiny_checkpoint, "exact")
    assert backend.endswith("-exact")
    assert model.dtype == torch.float32
    expected = [float(np.mean(nlls)) for nlls in plain_nlls(model, tokens, 64, 64, 4)]
    means, _ = measure(model, tokens, Protocol(64, 64, 4), "tiny")
    assert means == pytest.approx(expected, rel=1e-5)


def test_the_divergence_equals_the_plain_computation(
    original: PreTrainedModel, tiny_checkpoint: Path, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load_for_evaluation(tiny_checkpoint, "exact")
    monkeypatch.setattr("eval.likelihood._HEAD_CHUNK_TOKENS", 48)
    beside = Divergence(original)
    means, _ = measure(model, tokens, Protocol(64, 32, 3), "tiny", beside)
    assert means == measure(model, tokens, Protocol(64, 32, 3), "tiny")[0]
    divergences, equal = [], []
    for start, first in ((0, 0), (32, 31), (64, 31)):
        window_T = tokens[start : start + 64][None]
        p, q = (m(window_T, use_cache=False).logits[0, first:-1].double().softmax(-1) for m in (original, model))
        divergences += (p * (p / q).log()).sum(-1).tolist()
        equal += (p.argmax(-1) == q.argmax(-1)).tolist()
    assert len(equal) == 63 + 2 * 32
    assert beside.kl == pytest.approx(float(np.mean(divergences)), rel=1e-4)
    assert beside.top1 == np.mean(equal)
    assert 0 < beside.top1 < 1
    same = Divergence(original)
    measure(original, tokens, Protocol(64, 64, 2), "tiny", same)
    assert (same.kl, same.top1) == (0, 1)


def test_a_text_without_one_window(original: PreTrainedModel, tokens: Tensor) -> None:
    with pytest.raises(InputError, match="the text has 50 tokens, not one window of 64; use --window 50 or less"):
        measure(original, tokens[:50], Protocol(64, 64, None), "tiny")
    assert measure(original, tokens[:64], Protocol(64, 64, None), "tiny")[1] == [63]


def test_the_standard_error() -> None:
    values = [3.1, 2.9, 3.4, 3.05, 2.2]
    assert standard_error(values) == pytest.approx(float(np.std(values, ddof=1) / np.sqrt(5)), rel=1e-12)
    assert standard_error([2.0, 2.0]) == 0
    assert math.isnan(standard_error([2.0]))


def test_json_has_no_nan() -> None:
    values = {"a": math.nan, "b": [1.5, math.nan, {"c": (2, math.nan)}], "d": "NaN", "e": None, "f": True}
    expected = {"a": None, "b": [1.5, None, {"c": [2, None]}], "d": "NaN", "e": None, "f": True}
    assert json.loads(strict_json(values)) == expected
    assert strict_json(values).count("NaN") == 1


def run_json(capsys: Capture, *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert ppl.main([*arguments, "--json"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    result: dict[str, Any] = json.loads(printed, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    return result


def test_json_says_what_was_measured_and_how(
    tiny_checkpoint: Path, tiny_model: Path, calibration_text: Path, tokens: Tensor, capsys: Capture
) -> None:
    protocol = ["--text", str(calibration_text), "--window", "128", "--stride", "64", "--limit-windows", "6"]
    result = run_json(capsys, "--model", str(tiny_checkpoint), *protocol)
    expected = plain_nlls(load_for_evaluation(tiny_checkpoint, "exact")[0], tokens, 128, 64, 6)
    assert result["nll"] == pytest.approx(float(np.mean([nll for nlls in expected for nll in nlls])), rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(result["nll"]))
    means = [float(np.mean(nlls)) for nlls in expected]
    assert result["window_nll"] == pytest.approx(means, rel=1e-5)
    assert result["nll_stderr"] == pytest.approx(float(np.std(means, ddof=1) / np.sqrt(6)), rel=1e-3)
    known = {"tokens": 127 + 5 * 64, "windows": 6, "window": 128, "stride": 64, "text": calibration_text.name}
    assert known.items() <= result.items()
    assert result["text_sha256"] == hashlib.sha256(calibration_text.read_bytes()).hexdigest()
    assert result["model"] == str(tiny_checkpoint)
    assert result["backend"].endswith("-exact")
    assert result["tokens_per_second"] > 0

    fast = run_json(capsys, "--model", str(tiny_checkpoint), *protocol, "--backend", "fast")
    assert fast["backend"].endswith("-fast")
    assert 0 < abs(fast["nll"] - result["nll"]) < 0.2
    plain = run_json(capsys, "--model", str(tiny_model), *protocol)
    assert plain["backend"] == "torch-float32"
    single = run_json(
        capsys, "--model", str(tiny_model), "--text", str(calibration_text), "--window", "500", "--limit-windows", "1"
    )
    assert single["nll_stderr"] is None


def test_the_baseline_gives_the_rise(
    tiny_checkpoint: Path, tiny_model: Path, calibration_text: Path, capsys: Capture
) -> None:
    protocol = ["--text", str(calibration_text), "--window", "128", "--limit-windows", "5"]
    result = run_json(capsys, "--model", str(tiny_checkpoint), *protocol, "--baseline")
    source = run_json(capsys, "--model", str(tiny_model), *protocol)
    timings = {"seconds", "tokens_per_second"}
    assert {key: v for key, v in result["baseline"].items() if key not in timings} == {
        key: v for key, v in source.items() if key not in timings
    }
    differences = np.subtract(result["window_nll"], source["window_nll"])
    assert result["nll_rise"] == pytest.approx(float(differences.mean()), rel=1e-6)
    assert result["nll_rise_stderr"] == pytest.approx(float(differences.std(ddof=1) / np.sqrt(5)), rel=1e-6)

    assert ppl.main(["--model", str(tiny_checkpoint), *protocol, "--baseline"]) == 0
    printed = capsys.readouterr().out
    assert f"perplexity {result['perplexity']:.3f}" in printed
    assert f"original   {source['perplexity']:.3f}" in printed
    assert f"rise in nll {result['nll_rise']:.4f} ± {result['nll_rise_stderr']:.4f}, window by window" in printed
    assert f"(sha256 {source['text_sha256'][:16]}), 5 windows of 128" in printed


def test_the_record_is_written_once_and_replaced(
    tiny_checkpoint: Path, calibration_text: Path, tmp_path: Path, capsys: Capture
) -> None:
    directory = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    card = directory / "README.md"
    before = card.read_text()
    arguments = ["--model", str(directory), "--text", str(calibration_text), "--limit-windows", "4", "--record"]
    assert ppl.main([*arguments, "--window", "128"]) == 0
    once = card.read_text()
    assert once.startswith(before.rstrip())
    assert once.count("## Accuracy\n") == 1
    assert re.findall(r"^- perplexity .* 4 windows of 128, \S+-exact$", once, re.MULTILINE)
    assert ppl.main([*arguments, "--window", "128"]) == 0
    assert card.read_text() == once
    assert ppl.main([*arguments, "--window", "128", "--baseline"]) == 0
    with_baseline = card.read_text()
    lines = re.findall(r"^- perplexity .*$", with_baseline, re.MULTILINE)
    assert len(lines) == 1
    assert "; the original " in lines[0]
    assert "nll rise " in lines[0]
    assert ppl.main([*arguments, "--window", "64"]) == 0
    both = card.read_text()
    assert lines[0] in both
    assert len(re.findall(r"^- perplexity .*$", both, re.MULTILINE)) == 2
    for _ in range(2):
        assert ppl.main([*arguments, "--window", "64", "--stride", "32"]) == 0
    assert ppl.main([*arguments, "--window", "64"]) == 0
    lines = re.findall(r"4 windows of (.*), \S+$", card.read_text(), re.MULTILINE)
    assert sorted(lines) == ["128", "64", "64, stride 32"]
    assert both.count("## Accuracy\n") == 1
    assert Checkpoint.open(directory).recipe.method == "rtn"


def test_a_card_that_is_missing_is_begun(tmp_path: Path) -> None:
    result = Perplexity(
        perplexity=20.0,
        nll=2.9957,
        nll_stderr=0.01,
        tokens=10,
        windows=2,
        window=6,
        stride=6,
        text="some (odd) name.txt",
        text_sha256="0" * 64,
        model="m",
        backend="torch-float32",
        seconds=1.0,
        tokens_per_second=10.0,
        window_nll=(3.0, 2.99),
    )
    for _ in range(2):
        record(tmp_path, result, None)
    line = "- perplexity 20.000 (nll 2.9957 ± 0.0100) on some (odd) name.txt, sha256 0000000000000000, 2 windows of 6, "
    assert (tmp_path / "README.md").read_text().strip() == f"## Accuracy\n\n{line}torch-float32"


@pytest.mark.parametrize(
    ("flags", "exit_code", "message"),
    [
        (["--window", "1"], 2, "--window 1: expected at least 2"),
        (["--window", "64", "--stride", "65"], 2, "--stride 65: expected 1 to the window, 64"),
        (["--window", "64", "--stride", "0"], 2, "--stride 0: expected 1 to the window, 64"),
        (["--limit-windows", "0"], 2, "--limit-windows 0: expected at least 1"),
        (["--window", "600"], 2, "reads at most 512 tokens at once"),
        (["--text", "nowhere.txt"], 3, "nowhere.txt: no such file"),
        (["--model", "nobody/nothing"], 3, "--model nobody/nothing: no such directory"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    tiny_checkpoint: Path, calibration_text: Path, capsys: Capture, flags: list[str], exit_code: int, message: str
) -> None:
    for main, model in ((ppl.main, ["--model", str(tiny_checkpoint)]), (compare.main, [str(tiny_checkpoint)])):
        if main is compare.main and "--model" in flags:
            continue
        assert main([*model, "--text", str(calibration_text), *flags]) == exit_code
        printed = capsys.readouterr()
        assert message in printed.err
        assert printed.out == ""


def test_the_text_is_shorter_than_a_window(tiny_checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "short.txt").write_text("Short.")
    arguments = ["--model", str(tiny_checkpoint), "--text", str(tmp_path / "short.txt"), "--window", "64"]
    assert ppl.main(arguments) == 3
    assert "error: the text has 6 tokens, not one window of 64; use --window 6 or less" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--baseline", "--record"])
def test_what_only_a_checkpoint_has(tiny_model: Path, calibration_text: Path, capsys: Capture, flag: str) -> None:
    assert ppl.main(["--model", str(tiny_model), "--text", str(calibration_text), flag]) == 2
    assert f"{flag}: {tiny_model} is not a checkpoint made from another model" in capsys.readouterr().err
    assert not (tiny_model / "README.md").exists()


def test_without_a_model_it_says_how_to_make_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ppl.main([]) == 3
    assert "not made yet; `python -m quant.awq --bits 4` makes it, or name a --model" in capsys.readouterr().err


def test_two_checkpoints_side_by_side(
    tiny_model: Path, tiny_checkpoint: Path, tiny_asymmetric: Path, calibration_text: Path, capsys: Capture
) -> None:
    protocol = ["--text", str(calibration_text), "--window", "128", "--limit-windows", "4"]
    budget = ["--cpu-memory", "2GiB", "--max-new-tokens", "4"]
    assert compare.main([str(tiny_checkpoint), str(tiny_asymmetric), *protocol, *budget]) == 0
    head, titles, *rows = capsys.readouterr().out.rstrip("\n").split("\n")
    assert f"{calibration_text.name}, 4 windows of 128, sha256 " in head
    assert titles.split()[0] == "perplexity"
    measured = {
        "original": run_json(capsys, "--model", str(tiny_model), *protocol),
        "rtn": run_json(capsys, "--model", str(tiny_checkpoint), *protocol, "--baseline"),
        "rtn-asymmetric": run_json(capsys, "--model", str(tiny_asymmetric), *protocol, "--baseline"),
    }
    assert [row.split()[0] for row in rows] == list(measured)
    assert compare.main([str(tiny_checkpoint), *protocol, *budget, "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (first["accuracy"]["kl"], first["accuracy"]["top1"]) == (None, None)
    kl, top1 = second["accuracy"]["kl"], second["accuracy"]["top1"]
    assert f"  {kl:.4f}  {top1:5.1%}  " in rows[1]
    assert re.search(r"  -       -      \d", rows[0])
    for row, (name, expected) in zip(rows, measured.items(), strict=True):
        assert f"  {expected['perplexity']:.3f}  {expected['nll']:.4f} ± {expected['nll_stderr']:.4f}" in row
        if name == "original":
            assert row.split()[-1] == "-"
            continue
        assert f"{expected['nll_rise']:.4f} ± {expected['nll_rise_stderr']:.4f}" in row
        assert re.search(r"\d tokens/s, peak \d+\.\d MiB of 2\.0 GiB, 0 B/token from disk", row)


def test_checkpoints_of_different_models_are_not_compared(
    tiny_checkpoint: Path, tmp_path: Path, capsys: Capture
) -> None:
    other = shutil.copytree(tiny_checkpoint, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["recipe"]["source"] = "owner/another"
    (other / "manifest.json").write_text(json.dumps(manifest))
    assert compare.main([str(tiny_checkpoint), str(other)]) == 2
    error = capsys.readouterr().err
    assert "these checkpoints come from different models: " in error
    assert "owner/another" in error


def test_a_streamed_run_that_fails_is_named(tiny_checkpoint: Path, calibration_text: Path, capsys: Capture) -> None:
    protocol = ["--text", str(calibration_text), "--window", "64", "--limit-windows", "2"]
    assert compare.main([str(tiny_checkpoint), *protocol, "--cpu-memory", "1MiB"]) == 1
    assert "error: offload.generate failed: error: --cpu-memory 1.0 MiB: too small" in capsys.readouterr().err


def test_reading_through_an_int8_cache_is_the_same_but_for_its_rounding(
    tiny_model: Path, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of a window see what came before them, whether attention reads the blocks or is handed what they hold."""
    monkeypatch.setattr("eval.likelihood._PREFILLED_TOKENS", 100)
    model, _ = load_for_evaluation(tiny_model, "exact")
    whole, _ = measure(model, tokens, Protocol(300, 300, 2), "whole")
    handed, counts = measure(model, tokens, Protocol(300, 300, 2, "int8"), "handed")
    assert use_int8_attention(model)
    direct, _ = measure(model, tokens, Protocol(300, 300, 2, "int8"), "direct")
    assert counts == [299, 299]
    assert handed == pytest.approx(whole, rel=1e-3)
    assert handed != whole
    assert direct == pytest.approx(handed, rel=1e-5)


def test_the_cache_is_part_of_the_protocol(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", str(tiny_checkpoint), "--window", "64", "--limit-windows", "3"]
    results = tmp_path / "results.csv"
    assert ppl.main([*flags, "--kv", "int8", "--results", str(results)]) == 0
    assert "scored; keys and values in int8; " in capsys.readouterr().out
    assert ppl.main([*flags, "--results", str(results)]) == 0
    rows = list(csv.DictReader(results.read_text().splitlines()))
    assert [row["kv"] for row in rows] == ["int8", ""]
    assert 0 < abs(float(rows[0]["nll"]) - float(rows[1]["nll"])) < 0.01
