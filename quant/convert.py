"""Re-lay another tool's checkpoint, or a plain model, as this toolkit's. `python -m quant.convert --model DIR`"""

import argparse
import json
import sys
import time
from pathlib import Path

from offload.command import Parser, format_bytes, run, say
from offload.errors import UsageError
from offload.source import resolve_model


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run(_command, argv)


def _command(argv: list[str]) -> None:
    options = _parser().parse_args(argv)
    if options.output is not None and options.model is None:
        raise UsageError(f"--output {options.output}: name the --model that goes there")
    from offload.formats.convert import clear, describe_copies, opened, require_original
    from offload.formats.gguf_file import gguf_path

    if options.list:
        print("\n".join(describe_copies()) or "nothing was converted yet")
        return
    if options.clear:
        say(f"{format_bytes(clear())} removed")
        return
    started = time.monotonic()
    found = require_original(gguf_path(Path(options.model)) or resolve_model(options.model))
    if options.output is None:
        output = opened(found.path, plain=True)
    else:
        output = found.write(options.output, options.overwrite).directory
    seconds, kind = time.monotonic() - started, found.kind
    if options.json:
        print(json.dumps({"model": str(found.path), "format": kind, "output": str(output), "seconds": seconds}))
    else:
        say(f"{output}: of {kind}, in {seconds:.1f} s")
        say(f"next: python -m offload.generate --model {output}")


def _parser() -> argparse.ArgumentParser:
    parser = Parser("quant.convert", "Re-lay a checkpoint of AWQ, GPTQ, compressed-tensors or GGUF, or a plain model.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("-m", "--model", help="directory, .gguf file or hub id")
    what.add_argument("--list", action="store_true", help="list what was converted into the cache")
    what.add_argument("--clear", action="store_true", help="remove all of it")
    parser.add_argument("-o", "--output", type=Path, help="directory to write; default: the cache, where commands look")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint this toolkit wrote")
    parser.add_argument("--json", action="store_true", help="print one JSON object about the result on stdout")
    return parser


if __name__ == "__main__":
    sys.exit(main())
