"""Perplexity of a GGUF file in llama.cpp beside its checkpoint's here, on the same tokens. `python -m eval.exported`

llama.cpp must cut the text into the tokens that the checkpoint's own tokenizer gives, or nothing is measured. Each
window is read from an empty context and without a token before it, as `eval.ppl` does, over keys and values in float32.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eval.likelihood import Protocol, measure, standard_error
from eval.ppl import add_protocol_flags, load_for_evaluation, protocol_of, strict_json
from eval.results import RESULTS, append, circumstances, command_line
from offload.checkpoint import is_checkpoint
from offload.command import Parser, Progress, run
from offload.errors import InputError, UsageError
from offload.text import load_text, load_tokenizer, tokenize

_BATCH_TOKENS = 512
_FLOAT32 = 0
"""ggml's number of it."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One engine's mean nll of each window, in nats a token, under the name of what multiplied."""

    engine: str
    nll: tuple[float, ...]

    @property
    def mean_nll(self) -> float:
        """Return the mean over the windows, which all score equally many tokens."""
        return sum(self.nll) / len(self.nll)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run(_command, argv)


def llama_cpp(path: Path, window: int = _BATCH_TOKENS, **settings: Any) -> Any:
    """Open a file in llama.cpp. Raises InputError if it or llama-cpp-python is not there, or it does not open."""
    if find_spec("llama_cpp") is None:
        raise InputError("llama-cpp-python is not installed: pip install llama-cpp-python")
    if not path.is_file():
        raise InputError(f"{path}: no such file; `python -m quant.export --format gguf --output {path}` writes one")
    from llama_cpp import Llama

    floats = {"type_k": _FLOAT32, "type_v": _FLOAT32}
    threads = torch.get_num_threads()
    sizes = {"n_ctx": window, "n_batch": _BATCH_TOKENS, "n_threads": threads, "n_threads_batch": threads}
    try:
        return Llama(str(path), verbose=False, n_gpu_layers=0, **sizes, **floats, **settings)
    except ValueError as error:
        raise InputError(f"{path}: llama.cpp does not open it ({error})") from None


def require_same_tokens(path: Path, text: str, tokens: Tensor) -> None:
    """Raise InputError with the first place where the file's tokenizer gives a text other tokens than `tokens` [T]."""
    vocabulary = llama_cpp(path, vocab_only=True)
    found = vocabulary.tokenize(text.encode(), add_bos=False, special=False)
    vocabulary.close()
    expected = tokens.tolist()
    if found != expected:
        pairs = enumerate(zip(found, expected, strict=False))
        place = next((index for index, (a, b) in pairs if a != b), min(len(found), len(expected)))
        theirs, ours = found[place : place + 4], expected[place : place + 4]
        raise InputError(
            f"{path}: llama.cpp cuts the text into {len(found)} tokens, the checkpoint's tokenizer into "
            f"{len(expected)}; from token {place} on {theirs} for {ours}"
        )


def in_llama_cpp(path: Path, tokens: Tensor, protocol: Protocol) -> Reading:
    """Measure a file in llama.cpp on the windows of tokens [T] that `eval.likelihood.measure` scores whole."""
    starts = list(range(0, len(tokens) - protocol.window + 1, protocol.window))[: protocol.limit]
    model = llama_cpp(path, protocol.window, logits_all=True)
    progress, means = Progress(f"{path.name}, window", len(starts)), []
    for start in starts:
        window = tokens[start : start + protocol.window]
        model.reset()
        model.eval(window.tolist())
        logits = torch.from_numpy(np.asarray(model.scores[: len(window) - 1]))
        parts = zip(logits.split(_BATCH_TOKENS), window[1:].split(_BATCH_TOKENS), strict=True)
        total = sum(float(F.cross_entropy(part, target, reduction="sum")) for part, target in parts)
        means.append(total / (len(window) - 1))
        progress.advance()
    model.close()
    return Reading(f"llama.cpp, llama-cpp-python {version('llama-cpp-python')}", tuple(means))


def here(checkpoint: Path, mode: str, tokens: Tensor, protocol: Protocol) -> Reading:
    """Measure the checkpoint itself; mode: "exact", float32 activations, or "fast", int8 ones as llama.cpp has."""
    model, backend = load_for_evaluation(checkpoint, mode)
    means, _ = measure(model, tokens, protocol, f"{checkpoint.name}, {mode}, window")
    return Reading(backend, tuple(means))


def _command(argv: list[str]) -> None:
    options = _parser().parse_args(argv)
    protocol = protocol_of(options)
    if protocol.stride != protocol.window:
        raise UsageError(f"--stride {protocol.stride}: windows here are scored whole; leave it out")
    checkpoint, path = Path(options.model), Path(options.gguf)
    if not is_checkpoint(checkpoint):
        raise UsageError(f"--model {checkpoint}: not a checkpoint of this toolkit; name the one that was exported")
    text = load_text(options.text, "evaluation")
    tokens = tokenize(text, load_tokenizer(checkpoint))
    require_same_tokens(path, text.joined, tokens)
    engines = [partial(here, checkpoint, mode) for mode in ("exact", "fast")] + [partial(in_llama_cpp, path)]
    readings = [engine(tokens, protocol) for engine in engines]
    rows = [_columns(reading, readings[0]) for reading in readings]
    if options.record:
        about = circumstances(command_line("eval.exported", argv))
        about |= {"checkpoint": checkpoint.name, "file": path.name, "text": text.name, "text_sha256": text.sha256[:16]}
        about |= {"windows": len(readings[0].nll), "window": protocol.window}
        append(RESULTS / "exported.csv", [about | row for row in rows])
    if options.json:
        print(strict_json({"tokens": len(tokens), "window_nll": [r.nll for r in readings], "engines": rows}))
        return
    for row in rows:
        print(json.dumps(row)[1:-1].replace('"', ""))
    print(f"the same {len(tokens)} tokens by both tokenizers; {len(readings[0].nll)} windows of {protocol.window}")


def _columns(reading: Reading, exact: Reading) -> dict[str, Any]:
    """Return a row of the results file; the differences are from the checkpoint with float32 activations."""
    differences = [a - b for a, b in zip(reading.nll, exact.nll, strict=True)]
    return {
        "engine": reading.engine,
        "perplexity": round(float(np.exp(reading.mean_nll)), 4),
        "nll": round(reading.mean_nll, 5),
        "nll_over_exact": round(reading.mean_nll - exact.mean_nll, 5),
        "nll_over_exact_stderr": round(standard_error(differences), 5),
    }


def _parser() -> argparse.ArgumentParser:
    parser = Parser("eval.exported", "Measure a GGUF file in llama.cpp beside the checkpoint it was exported from.")
    parser.add_argument("-m", "--model", required=True, help="the checkpoint")
    parser.add_argument("--gguf", required=True, metavar="FILE", help="what quant.export --format gguf made of it")
    add_protocol_flags(parser)
    parser.add_argument("--record", action="store_true", help="append the figures to eval/results/exported.csv")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(main())
