"""What each way of quantizing costs: accuracy, seconds, memory, a row a run. `python -m eval.quality RUNS.jsonl`

RUNS.jsonl holds what `python -m quant.METHOD --json` printed, a line a run; the checkpoints are still where it says.
"""

import json
import sys
from pathlib import Path
from typing import Any

from eval.ppl import (
    Perplexity,
    add_protocol_flags,
    evaluate,
    load_for_evaluation,
    load_original,
    protocol_of,
    rise,
)
from eval.results import RESULTS, append, circumstances, command_line
from offload.checkpoint import Checkpoint, Recipe
from offload.command import Parser, run, say
from offload.errors import InputError, UsageError
from offload.source import resolve_model
from offload.text import load_text, load_tokenizer, tokenize

_COSTS = {"output", "bits_per_weight", "seconds", "cpu_seconds", "peak_memory_bytes"}


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run(_command, argv)


def _command(argv: list[str]) -> None:
    parser = Parser("eval.quality", "Measure every checkpoint of a list of calibrations, beside what each one cost.")
    parser.add_argument("runs", type=Path, help="lines that `python -m quant.METHOD --json` printed")
    add_protocol_flags(parser)
    parser.add_argument("--record", action="store_true", help="append the rows to the results file")
    parser.add_argument("--results", type=Path, default=RESULTS / "quality.csv", help="results file")
    options = parser.parse_args(argv)
    protocol = protocol_of(options)
    runs = read_runs(options.runs)
    checkpoints = [Checkpoint.open(run["output"]) for run in runs]
    sources = {checkpoint.recipe.source for checkpoint in checkpoints}
    if len(sources) > 1:
        raise UsageError(f"these checkpoints come from different models: {', '.join(map(str, sources))}")
    source = resolve_model(sources.pop())
    text = load_text(options.text, "evaluation")
    tokens = tokenize(text, load_tokenizer(source))
    original = evaluate(*load_original(source), tokens, text, protocol)
    rows = []
    for cost, checkpoint in zip(runs, checkpoints, strict=True):
        model, backend = load_for_evaluation(checkpoint.directory, options.backend)
        accuracy = evaluate(model, str(checkpoint.directory), backend, tokens, text, protocol)
        del model
        rows.append(_columns(checkpoint.recipe, cost, accuracy, original))
        print("  ".join(f"{key}={value}" for key, value in rows[-1].items() if value != ""), flush=True)
    if options.record:
        around = circumstances(command_line("eval.quality", argv))
        append(options.results, [{key: around[key] for key in ("date", "commit")} | row for row in rows])
        say(f"{len(rows)} rows appended to {options.results}")


def read_runs(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines. Raises InputError naming the line that is not of a calibration."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    runs = []
    for number, line in enumerate(lines, start=1):
        try:
            found = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}: line {number} is not JSON ({error})") from None
        if not isinstance(found, dict) or not _COSTS.issubset(found):
            raise InputError(f"{path}: line {number} is not what a quant command prints with --json")
        runs.append(found)
    if not runs:
        raise InputError(f"{path}: no runs")
    return runs


def _columns(recipe: Recipe, cost: dict[str, Any], accuracy: Perplexity, original: Perplexity) -> dict[str, Any]:
    """Return a row of the results file.

    text: what was calibrated on. cpu_seconds: of all threads, which other work on the machine does not lengthen.
    """
    change, error = rise(accuracy, original)
    return {
        "method": recipe.method,
        "settings": json.dumps(recipe.settings, separators=(",", ":")),
        "group_size": recipe.group_size or "row",
        "symmetric": recipe.symmetric,
        "num_samples": recipe.num_samples or "",
        "seq_len": recipe.seq_len or "",
        "text": recipe.calibration_name or "",
        "windows": accuracy.windows,
        "nll_rise": round(change, 5),
        "nll_rise_stderr": round(error, 5),
        "calibration_seconds": cost["seconds"],
        "cpu_seconds": cost["cpu_seconds"],
        "peak_bytes": cost["peak_memory_bytes"],
        "bits_per_weight": cost["bits_per_weight"],
        "evaluation_text": accuracy.text,
        "window": accuracy.window,
    }


if __name__ == "__main__":
    sys.exit(main())
