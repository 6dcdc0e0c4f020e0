"""GGUF files: Q4_0 and Q8_0 as transformers dequantises them, to the bit; the others and damage refused by name."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from kernels.packed import dequantize
from kernels.repack import from_ggml
from offload.checkpoint import Checkpoint
from offload.errors import CheckpointError, InputError
from offload.executor import executor_of, load
from offload.formats import convert
from quant.convert import main

TOKENS = torch.tensor([[5, 77, 130, 9, 200, 41, 3]])


def write_gguf(
    path: Path,
    tiny_model: Path,
    linears: Kind,
    *,
    architecture: str = "llama",
    down: Kind | None = None,
    head: Kind | None = None,
    extra: str | None = None,
    pre: str | None = "smollm",
) -> None:
    """Write a model of two layers, hidden 64, 4 query and 2 key heads, with the tokens of the tiny model."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    vocabulary = [*sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__), "ab", "ba"]
    head_size = 128 if architecture == "qwen3" else 16  # transformers reads no other out of a Qwen3 file
    writer, random = gguf.GGUFWriter(path, architecture), np.random.default_rng(3)
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(head_size)
    writer.add_key_length(head_size)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary)
    writer.add_token_types([3] + [1] * (len(vocabulary) - 1))
    writer.add_token_merges(["a b", "b a"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)

    def add(name: str, shape: tuple[int, ...], kind: Kind) -> None:
        values = (random.standard_normal(shape) * 0.2 + (len(shape) == 1)).astype(np.float32)
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    for layer in range(2):
        for name, shape in {
            "attn_q": (4 * head_size, 64),
            "attn_k": (2 * head_size, 64),
            "attn_v": (2 * head_size, 64),
            "attn_output": (64, 4 * head_size),
            "ffn_gate": (128, 64),
            "ffn_up": (128, 64),
            "ffn_down": (64, 128),
        }.items():
            kind = down if name == "ffn_down" and down is not None else linears
            add(f"blk.{layer}.{name}.weight", shape, kind)
            if architecture == "qwen2" and name in ("attn_q", "attn_k", "attn_v"):
                add(f"blk.{layer}.{name}.bias", shape[:1], Kind.F32)
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{layer}.{name}.weight", (64,), Kind.F32)
        if architecture == "qwen3":
            for name in ("attn_q_norm", "attn_k_norm"):
                add(f"blk.{layer}.{name}.weight", (head_size,), Kind.F32)
    add("token_embd.weight", (len(vocabulary), 64), Kind.Q8_0)
    add("output_norm.weight", (64,), Kind.F32)
    if head is not None:
        add("output.weight", (len(vocabulary), 64), head)
    if extra is not None:
        add(extra, (32,), Kind.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(convert, "cache_directory", lambda: tmp_path / "cache")
    return tmp_path / "cache"


@pytest.mark.parametrize(("kind", "bits"), [(Kind.Q4_0, 4), (Kind.Q8_0, 8)])
def test_blocks_mean_what_ggufs_own_reader_says(kind: Kind, bits: int) -> None:
    random = np.random.default_rng(0)
    blocks = gguf.quants.quantize(random.standard_normal((7, 96)).astype(np.float32), kind)
    weight = from_ggml(torch.from_numpy(blocks), bits)
    assert torch.equal(dequantize(weight), torch.from_numpy(gguf.quants.dequantize(blocks, kind)))
    with pytest.raises(ValueError, match=f"rows of {blocks.shape[1] - 1} bytes; expected a multiple of {2 + 4 * bits}"):
        from_ggml(torch.from_numpy(blocks[:, 1:].copy()), bits)


@pytest.mark.parametrize(
    ("architecture", "linears", "down", "head"),
    [
        ("llama", Kind.Q4_0, None, None),
        ("llama", Kind.Q4_0, Kind.Q8_0, Kind.Q8_0),
        ("llama", Kind.Q8_0, Kind.F16, Kind.Q5_0),
        ("qwen2", Kind.Q4_0, Kind.BF16, Kind.Q4_0),
        ("qwen3", Kind.Q8_0, None, None),
    ],
)
def test_a_gguf_file_computes_what_transformers_reads_in_it(
    architecture: str, linears: Kind, down: Kind | None, head: Kind | None, tiny_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "theirs.gguf"
    write_gguf(path, tiny_model, linears, architecture=architecture, down=down, head=head)
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    ).eval()
    for device_map in ("cpu", "disk"):
        model = load(path, dtype=torch.float32, mode="exact", device_map=device_map)
        with torch.inference_mode():
            expected, found = reference(TOKENS).logits, model(TOKENS).logits
        assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()
        executor_of(model).close()
    kept = load(path, dtype=torch.float32, mode="exact")
    for name, weight in reference.named_parameters():
        if name.endswith("_proj.weight"):
            assert torch.equal(kept.get_submodule(name.removesuffix(".weight")).weight, weight), name


def test_it_is_re_laid_once_and_the_directory_around_it_will_do(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "dir").mkdir()
    write_gguf(tmp_path / "dir" / "a.gguf", tiny_model, Kind.Q4_0, down=Kind.Q8_0)
    copy = convert.opened(tmp_path / "dir" / "a.gguf")
    assert "of gguf, re-laid once into" in capsys.readouterr().err
    assert convert.opened(tmp_path / "dir") == copy
    assert "re-laid" not in capsys.readouterr().err
    recipe = Checkpoint.open(copy).recipe
    assert (recipe.bits, recipe.group_size, len(recipe.wide)) == (4, 32, 2)
    text = "The quick brown fox"
    assert (
        AutoTokenizer.from_pretrained(copy)(text).input_ids == AutoTokenizer.from_pretrained(tiny_model)(text).input_ids
    )
    assert main(["--model", str(tmp_path / "dir"), "--output", str(tmp_path / "ours")]) == 0
    for one, other in zip(Checkpoint.open(copy).blobs, Checkpoint.open(tmp_path / "ours").blobs, strict=True):
        assert one.path.read_bytes() == other.path.read_bytes()
    (tmp_path / "dir" / "b.gguf").write_bytes(b"")
    with pytest.raises(InputError, match=r"2 GGUF files in it; name one, .*a\.gguf say"):
        convert.opened(tmp_path / "dir")


def test_what_is_not_exact_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "theirs.gguf"
    write_gguf(path, tiny_model, Kind.Q4_0, down=Kind.Q4_1)
    with pytest.raises(
        InputError, match=r"'blk\.0\.ffn_down\.weight' is Q4_1, which no codes .* hold exactly; expected"
    ):
        convert.opened(path)
    write_gguf(path, tiny_model, Kind.F16)
    with pytest.raises(InputError, match="none of its linears is quantized as Q4_0 or Q8_0"):
        convert.opened(path)
    write_gguf(path, tiny_model, Kind.Q4_0, extra="rope_freqs.weight")
    with pytest.raises(CheckpointError, match=r"tensor 'rope_freqs\.weight' is not one of it"):
        convert.opened(path)


def test_damage_is_refused(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "theirs.gguf"
    write_gguf(path, tiny_model, Kind.Q4_0)
    whole = path.read_bytes()
    for size in (0, 3, 40, 2000, len(whole) - 9000):
        path.write_bytes(whole[:size])
        assert main(["--model", str(path)]) == 3
        assert "no whole GGUF file" in capsys.readouterr().err
