"""The original and its checkpoints side by side: accuracy, size, a streamed run of each. `python -m eval.compare`"""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
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
    strict_json,
)
from eval.results import RESULTS, append, circumstances, command_line
from offload.checkpoint import Checkpoint
from offload.command import Parser, format_bytes, run, say
from offload.errors import ToolkitError, UsageError
from offload.source import resolve_model
from offload.text import load_text, load_tokenizer, tokenize


@dataclass(frozen=True, slots=True)
class Row:
    """One model of the table. size_bytes: of its weights. streamed: the report of offload.generate, for checkpoints."""

    name: str
    size_bytes: int
    accuracy: Perplexity
    streamed: dict[str, Any] | None


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run(_command, argv)


def _command(argv: list[str]) -> None:
    parser = Parser("eval.compare", "Compare checkpoints with the model they were made from.")
    parser.add_argument("checkpoints", nargs="+", type=Path, help="checkpoint directories, of one source model")
    add_protocol_flags(parser)
    parser.add_argument("--cpu-memory", default="370MiB", help="budget of the streamed runs")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="tokens of the streamed runs")
    parser.add_argument("--record", action="store_true", help="append the rows to the results file")
    parser.add_argument("--results", type=Path, default=RESULTS / "models.csv", help="results file")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    protocol = protocol_of(options)
    opened = [Checkpoint.open(directory) for directory in options.checkpoints]
    sources = {checkpoint.recipe.source for checkpoint in opened}
    if len(sources) > 1:
        raise UsageError(f"these checkpoints come from different models: {', '.join(map(str, sources))}")
    source = resolve_model(sources.pop())
    text = load_text(options.text, "evaluation")
    tokens = tokenize(text, load_tokenizer(source))
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    original, name, backend = load_original(source)
    rows = [Row("original", size, evaluate(original, name, backend, tokens, text, protocol), None)]
    for checkpoint in opened:
        model, backend = load_for_evaluation(checkpoint.directory, options.backend)
        accuracy = evaluate(model, str(checkpoint.directory), backend, tokens, text, protocol, original)
        del model
        streamed = _streamed_run(checkpoint.directory, options.cpu_memory, options.max_new_tokens)
        rows.append(Row(checkpoint.directory.name, checkpoint.nbytes, accuracy, streamed))
    print(strict_json([asdict(row) for row in rows]) if options.json else _table(rows))
    if options.record:
        around = circumstances(command_line("eval.compare", argv))
        append(options.results, [around | _columns(row, rows[0]) for row in rows])
        say(f"{len(rows)} rows appended to {options.results}")


def _streamed_run(directory: Path, budget: str, max_new_tokens: int) -> dict[str, Any]:
    """Generate in a process of its own, whose peak memory is then its own."""
    say(f"{directory}: generating within {budget}")
    command = [sys.executable, "-m", "offload.generate", "--model", str(directory), "--cpu-memory", budget, "--json"]
    result = subprocess.run(
        [*command, "--max-new-tokens", str(max_new_tokens)], capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise ToolkitError(f"offload.generate failed: {result.stderr.strip().splitlines()[-1]}")
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def _columns(row: Row, original: Row) -> dict[str, Any]:
    """Return a row of the results file."""
    accuracy, streamed = row.accuracy, row.streamed or {}
    change, error = rise(accuracy, original.accuracy)
    return {
        "model": row.name,
        "size_bytes": row.size_bytes,
        "text": accuracy.text,
        "text_sha256": accuracy.text_sha256[:16],
        "windows": accuracy.windows,
        "window": accuracy.window,
        "nll": round(accuracy.nll, 5),
        "nll_stderr": round(accuracy.nll_stderr, 5),
        "nll_rise": round(change, 5),
        "nll_rise_stderr": round(error, 5),
        "kl": "" if accuracy.kl is None else round(accuracy.kl, 5),
        "top1": "" if accuracy.top1 is None else round(accuracy.top1, 5),
        "budget_bytes": streamed.get("budget_bytes", ""),
        "peak_bytes": streamed.get("peak_memory_bytes", ""),
        "disk_bytes_per_token": streamed.get("disk_bytes_per_token", ""),
        "tokens_per_s": round(streamed["decode_tokens_per_second"], 2) if streamed else "",
        "limit": streamed.get("limit", ""),
        "of_limit": round(streamed["fraction"], 3) if streamed else "",
    }


def _table(rows: list[Row]) -> str:
    width = max(len(row.name) for row in rows)
    first = rows[0].accuracy
    lines = [
        f"{first.text}, {first.windows} windows of {first.window}, sha256 {first.text_sha256[:16]}",
        f"{'':{width}}  perplexity  nll ± stderr       rise over original   KL      top-1  size        streamed run",
    ]
    for row in rows:
        change = "-" if row is rows[0] else "{:.4f} ± {:.4f}".format(*rise(row.accuracy, first))
        spread = f"{row.accuracy.nll:.4f} ± {row.accuracy.nll_stderr:.4f}"
        kl, top1 = row.accuracy.kl, row.accuracy.top1
        beside = "-       -    " if kl is None or top1 is None else f"{kl:.4f}  {top1:5.1%}"
        lines.append(
            f"{row.name:{width}}  {row.accuracy.perplexity:10.3f}  {spread:17}  {change:19}  {beside}  "
            f"{format_bytes(row.size_bytes):10}  {_describe(row.streamed)}"
        )
    return "\n".join(lines)


def _describe(streamed: dict[str, Any] | None) -> str:
    if streamed is None:
        return "-"
    peak, budget = format_bytes(streamed["peak_memory_bytes"]), format_bytes(streamed["budget_bytes"])
    return (
        f"{streamed['decode_tokens_per_second']:.1f} tokens/s, peak {peak} of {budget}, "
        f"{format_bytes(streamed['disk_bytes_per_token'])}/token from disk"
    )


if __name__ == "__main__":
    sys.exit(main())
