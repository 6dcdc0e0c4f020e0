"""The tokenizer inside a GGUF file, cut as the name in `tokenizer.ggml.pre` says: llama.cpp's names for byte-level BPE.

Merges are learned on pieces of text that a pre-tokenizer cut. A file does not hold how, it names it; transformers
knows some of the names, and takes GPT-2's way for all others without a word.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from offload.errors import CheckpointError, InputError

GPT2_WORDS, DIGITS = "ByteLevel", "Digits"
"""Steps that `tokenizers` has names for: GPT-2's regular expression, and every digit alone."""

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CUTS: Mapping[str, tuple[str, ...]] = {
    "llama-bpe": (_WORDS % "{1,3}",),
    "qwen2": (_WORDS % "",),
    "smollm": (DIGITS, GPT2_WORDS),
    "gpt-2": (GPT2_WORDS,),
    "tekken": (_CASED,),
}
"""The steps that cut text, the two above or regular expressions, by their names in llama.cpp (llama-vocab.cpp)."""

_SAME = {
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "pixtral"), "llama-bpe"),
    **dict.fromkeys(("deepseek-r1-qwen", "megrez"), "qwen2"),
    **dict.fromkeys(("starcoder", "refact", "command-r"), "smollm"),
}
_WHOLE_WORDS_FIRST = ("llama-bpe", "tekken")  # a piece that is a token is not merged, where llama.cpp says so


def load_gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Build the tokenizer of a GGUF file, that of the same text in llama.cpp.

    Raises CheckpointError for a damaged one, InputError for one that cuts text in a way unknown here.
    """
    try:
        name = _name_of_cut(path)
        tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except InputError:
        raise
    except Exception as error:  # neither reader has an error of its own
        raise CheckpointError(f"{path}: tokenizer: {type(error).__name__}: {error}") from None
    if name is not None:
        _cut(tokenizer.backend_tokenizer, name)
    loaded: PreTrainedTokenizerBase = tokenizer
    return loaded


def _name_of_cut(path: Path) -> str | None:
    """Return the key in `CUTS`, None for SentencePiece, which cuts nothing. Raises InputError for another."""
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    if "tokenizer.ggml.model" not in fields or fields["tokenizer.ggml.model"].contents() != "gpt2":
        return None
    found = fields["tokenizer.ggml.pre"].contents() if "tokenizer.ggml.pre" in fields else None
    name = _SAME.get(str(found), str(found))
    if name not in CUTS:
        raise InputError(
            f"{path}: its tokenizer cuts text by tokenizer.ggml.pre {found!r}; expected one of "
            f"{', '.join([*CUTS, *_SAME])}: take a file that a newer llama.cpp converted, or the model's safetensors"
        )
    return name


def _cut(tokenizer: Tokenizer, name: str) -> None:
    """Let a tokenizer cut text by a name of `CUTS`."""
    steps = [_step(step) for step in CUTS[name]]
    if GPT2_WORDS not in CUTS[name]:
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.model.ignore_merges = name in _WHOLE_WORDS_FIRST


def _step(step: str) -> pre_tokenizers.PreTokenizer:
    if step == GPT2_WORDS:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if step == DIGITS:
        return pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Split(Regex(step), behavior="isolated")
