"""What a checkpoint is and what it cost, on one page. `python -m eval.report CHECKPOINT [--html FILE]`

Everything but the accuracy was written down when the checkpoint was made; `--measure` runs it beside its original.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from eval.likelihood import Protocol
from eval.ppl import add_protocol_flags, evaluate, load_for_evaluation, load_original, protocol_of, rise, strict_json
from eval.report_facts import Accuracy, Report, describe, summary
from eval.report_page import page
from eval.report_picture import draw_report
from offload.checkpoint import Checkpoint
from offload.command import Parser, run, say
from offload.errors import ResourceError
from offload.source import resolve_model
from offload.text import load_text, load_tokenizer, tokenize


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run(_command, argv)


def _command(argv: list[str]) -> None:
    parser = Parser("eval.report", "Report what a checkpoint is, what was chosen in it, and what it costs.")
    parser.add_argument("checkpoint", type=Path, help="checkpoint directory")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with pictures, complete in itself")
    parser.add_argument("--picture", type=Path, metavar="FILE.svg", help="draw what it came to, layer by layer")
    parser.add_argument("--measure", action="store_true", help="measure its accuracy beside the original's")
    add_protocol_flags(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    protocol = protocol_of(options)
    checkpoint = Checkpoint.open(options.checkpoint)
    report = describe(checkpoint, _accuracy(checkpoint, options, protocol) if options.measure else None)
    for flag, path, draw in (("--html", options.html, page), ("--picture", options.picture, draw_report)):
        if path is not None:
            try:
                path.write_text(draw(report), encoding="utf-8")
            except OSError as error:
                raise ResourceError(f"{flag} {path}: cannot be written ({error.strerror})") from None
            say(f"{path} written")
    print(strict_json(asdict(report)) if options.json else _lines(report))


def _accuracy(checkpoint: Checkpoint, options: argparse.Namespace, protocol: Protocol) -> Accuracy:
    source = resolve_model(checkpoint.recipe.source)
    text = load_text(options.text, "evaluation")
    tokens = tokenize(text, load_tokenizer(source))
    original, name, backend = load_original(source)
    before = evaluate(original, name, backend, tokens, text, protocol)
    model, backend = load_for_evaluation(checkpoint.directory, options.backend)
    after = evaluate(model, str(checkpoint.directory), backend, tokens, text, protocol, original)
    return Accuracy(before, after, *rise(after, before))


def _lines(report: Report) -> str:
    """Return the report as text: a table of the layers, and what the page says in its tiles."""
    lines = [f"{title:12} {value}  {note}".rstrip() for title, value, note in summary(report)]
    errors = {name: layer for name, layer in report.layers.items() if "error" in layer}
    if errors:
        width = max(map(len, errors))
        lines += ["", f"{'layer':{width}}  error    to nearest  ratio"]
    for name, layer in errors.items():
        error, nearest = layer["error"], layer["rtn_error"]
        note = "  fell back to nearest" if layer["fallback"] else ""
        lines.append(f"{name:{width}}  {error:.5f}  {nearest:.5f}     {error / nearest:.3f}{note}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
