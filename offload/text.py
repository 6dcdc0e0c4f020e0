"""Where text comes from: the embedded default, a local file, or a hub dataset.

The embedded default is `pydoc_data.topics`, the English of Python's own help, which every installation has. It is split
by topic into a calibration and an evaluation part that share no paragraph.
"""

import hashlib
import json
import os
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from offload.errors import InputError

Part = Literal["calibration", "evaluation"]
_TEXT_SUFFIXES = (".txt", ".raw", ".md", ".text")
_SEPARATOR = "\n\n"
_PIECE_CHARACTERS = 2 << 20


@dataclass(frozen=True, slots=True)
class Text:
    """Documents, where they came from, and the sha256 of all of them joined by a blank line."""

    documents: tuple[str, ...]
    name: str

    @property
    def joined(self) -> str:
        """All documents in one string: what is tokenised."""
        return _SEPARATOR.join(self.documents)

    @property
    def sha256(self) -> str:
        """Identify the text, in a recipe or beside a perplexity."""
        return hashlib.sha256(self.joined.encode()).hexdigest()


def load_text(name: str | None, part: Part, column: str = "text") -> Text:
    """Return the text that `--text` or `--calibration` names; None is the embedded default's `part`.

    A .txt, .raw or .md file is one document; .jsonl and .parquet hold one a row, in `column`; anything else is a hub
    dataset, `owner/name[:config[:split]]`. Raises InputError saying what is wrong with it.
    """
    if name is None:
        return _embedded_text(part)
    path = Path(name)
    if not os.path.exists(path):  # of any text, where Path.exists raises if it is too long for a name
        if path.suffix in (*_TEXT_SUFFIXES, ".jsonl", ".parquet"):
            raise InputError(f"{name}: no such file")
        return Text(_from_hub(name, column), name)
    if not path.is_file():
        raise InputError(f"{name}: not a file")
    if path.stat().st_size == 0:
        raise InputError(f"{name}: empty, 0 bytes")
    if path.suffix == ".parquet":
        return Text(_from_parquet(path, column), path.name)
    content = _read_utf8(path)
    return Text(_from_jsonl(path, content, column) if path.suffix == ".jsonl" else (content,), path.name)


def load_tokenizer(directory: Path) -> Any:
    """Return the tokenizer in a model directory. Raises InputError if there is none that transformers can load."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # the tokenizers package raises that very class
        reason = textwrap.shorten(str(error), 200, placeholder=" ...")
        raise InputError(f"{directory}: no tokenizer that transformers can load ({reason})") from None


def tokenize(text: Text, tokenizer: Any) -> Tensor:
    """Return the text's tokens, int64 [T]: all documents joined by a blank line and tokenised, no template.

    A long text is tokenised in pieces, as a tokenizer needs some 150 bytes of memory for one of text; they are cut
    where the usual tokenizers cut words. Raises InputError if there are no tokens.
    """
    pieces = (
        tokenizer(piece, return_tensors="pt", verbose=False, add_special_tokens=number == 0).input_ids[0]
        for number, piece in enumerate(_pieces(text.joined))
    )
    tokens = torch.cat([piece.to(torch.int64) for piece in pieces])
    if len(tokens) == 0:
        raise InputError(f"{text.name}: 0 tokens")
    return tokens


def _pieces(text: str) -> Iterator[str]:
    """Yield the text in pieces, each cut before a single space between two words, if there is one near its end."""
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        end = start + _PIECE_CHARACTERS
        spaces = re.finditer(r"(?<=\S) (?=\S)", text[end - _PIECE_CHARACTERS // 16 : end + 1])
        places = [found.start() for found in spaces]
        cut = end - _PIECE_CHARACTERS // 16 + places[-1] if places else end
        yield text[start:cut]
        start = cut
    yield text[start:]


def sample_windows(tokens: Tensor, num_samples: int, seq_len: int, seed: int) -> Tensor:
    """Choose windows that do not overlap: int64 [num_samples, seq_len]. Raises InputError if the text is too short."""
    available = len(tokens) // seq_len
    if available < num_samples:
        if available:
            fits = f"--num-samples {available}"
        elif len(tokens) >= num_samples:
            fits = f"--seq-len {len(tokens) // num_samples}"
        else:
            fits = f"--num-samples 1 --seq-len {len(tokens)}"
        raise InputError(
            f"calibration text: {num_samples} windows of {seq_len} tokens need {num_samples * seq_len}, "
            f"it has {len(tokens)}; {fits} fits, or give more text"
        )
    chosen = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:num_samples]
    return tokens[: available * seq_len].view(available, seq_len)[chosen]


def _embedded_text(part: Part) -> Text:
    """Every other topic, by name. Evaluation leaves out each paragraph that calibration has as well."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    documents = [topics[name] for name in names[0 if part == "calibration" else 1 :: 2]]
    if part == "evaluation":
        other = _embedded_text("calibration").documents
        seen = {paragraph.strip() for document in other for paragraph in document.split(_SEPARATOR)}
        cut = [[p for p in document.split(_SEPARATOR) if p.strip() not in seen] for document in documents]
        documents = [_SEPARATOR.join(paragraphs) for paragraphs in cut if paragraphs]
    return Text(tuple(documents), f"pydoc_data.topics ({part} half)")


def _read_utf8(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    nul = content.find(0)
    if nul >= 0:
        raise InputError(f"{path}: not text: byte {nul} is NUL")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not text: byte {error.start} is not valid UTF-8") from None


def _from_jsonl(path: Path, content: str, column: str) -> tuple[str, ...]:
    documents = []
    for number, line in enumerate(content.split("\n"), start=1):  # splitlines also cuts at U+2028, inside a string
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: line {number} is not JSON ({error})") from None
        documents.append(_column(f"{path}: line {number}", row, column))
    if not documents:
        raise InputError(f"{path}: no rows")
    return tuple(documents)


def _from_parquet(path: Path, column: str) -> tuple[str, ...]:
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a parquet file ({str(error).splitlines()[0]})") from None
    if not rows:
        raise InputError(f"{path}: no rows")
    return tuple(_column(f"{path}: row {number}", row, column) for number, row in enumerate(rows, start=1))


def _from_hub(name: str, column: str) -> tuple[str, ...]:
    import datasets

    repository, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    try:
        rows = datasets.load_dataset(repository, config or None, split=split or "train")
    except (OSError, ValueError, ConnectionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{name}: no such file, and the hub did not give such a dataset ({type(error).__name__}: {reason}); "
            "name a local .txt, .jsonl or .parquet file instead"
        ) from None
    return tuple(_column(f"{name}: row {number}", row, column) for number, row in enumerate(rows, start=1))


def _column(where: str, row: object, column: str) -> str:
    if not isinstance(row, dict) or column not in row:
        found = ", ".join(map(repr, sorted(row))) if isinstance(row, dict) else type(row).__name__
        raise InputError(f"{where}: no column {column!r}; found {found}")
    value = row[column]
    if not isinstance(value, str):
        raise InputError(f"{where}: column {column!r} holds {type(value).__name__}, not text")
    return value
