"""What a GGUF file says beside its tensors: the model's sizes and its tokenizer, in the words of llama.cpp.

The keys are those that llama.cpp's convert_hf_to_gguf.py writes for these architectures; special tokens, merges and the
chat template are read by gguf's own `SpecialVocab`.
"""

from pathlib import Path
from typing import Any

import torch
from gguf import GGUFWriter, LlamaFileType, SpecialVocab, TokenType
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from offload.errors import InputError
from offload.files import read_json
from offload.formats.gguf_tokenizer import CUTS, DIGITS, GPT2_WORDS
from offload.text import load_tokenizer

ARCHITECTURES = ("llama", "qwen2", "qwen3")

_QUANTIZATION_VERSION = 2
_NAMES = {steps: name for name, steps in CUTS.items()}


def check_config(config: PretrainedConfig) -> None:
    """Raise InputError for a model that llama.cpp would compute otherwise than transformers does."""
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    for what, found, expected in (
        ("model_type", config.model_type, ARCHITECTURES),
        ("hidden_act", getattr(config, "hidden_act", None), ("silu",)),
        ("rope_type", rope, ("default", "llama3") if config.model_type == "llama" else ("default",)),
        ("use_sliding_window", bool(getattr(config, "use_sliding_window", False)), (False,)),
    ):
        if found not in expected:
            wanted = " or ".join(map(str, expected))
            raise InputError(
                f"--format gguf: {what} {found}; it is written for {wanted}: export as gptq or awq, or convert the "
                "unquantized model with llama.cpp's own convert_hf_to_gguf.py"
            )


def head_size(config: PretrainedConfig) -> int:
    """Return the elements of a query or key."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rope_factors(config: PretrainedConfig) -> Tensor | None:
    """Return what llama.cpp divides each frequency by, float32 [head_size / 2]; None for nothing.

    Llama 3's, as transformers computes them: the plain frequencies over the scaled ones.
    """
    if config.rope_parameters["rope_type"] == "default":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, torch.device("cpu"))
    size = head_size(config)
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, size, 2).double() / size)
    factors: Tensor = (plain / scaled.double()).float()
    return factors


def add_model(writer: GGUFWriter, config: PretrainedConfig, name: str, file_type: LlamaFileType) -> None:
    """Add the keys of the model itself."""
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(_QUANTIZATION_VERSION)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_rope_dimension_count(head_size(config))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def add_tokenizer(writer: GGUFWriter, directory: Path, vocab_size: int) -> None:
    """Add the tokenizer of a model directory. Raises InputError for one that llama.cpp has no name for."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{path}: missing; --format gguf writes the tokenizer that it describes")
    described, tokenizer = read_json(path), load_tokenizer(directory)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(path, described))
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    kinds = [TokenType.UNUSED] * vocab_size
    for token, index in tokenizer.get_vocab().items():
        if index >= vocab_size:
            raise InputError(f"{path}: token {index} {token!r}, where the model has {vocab_size}")
        tokens[index], kinds[index] = token, TokenType.NORMAL
    for index, added in tokenizer.added_tokens_decoder.items():
        kinds[index] = TokenType.CONTROL if added.special else TokenType.USER_DEFINED
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    special = SpecialVocab(directory, load_merges=True, n_vocab=vocab_size)
    if not special.merges:
        raise InputError(f"{path}: a tokenizer without merges, which llama.cpp does not open")
    special.add_to_gguf(writer, quiet=True)


def _pre_tokenizer(path: Path, described: dict[str, Any]) -> str:
    """Return llama.cpp's name for how a tokenizer.json cuts text. Raises InputError if it has none."""
    pre, model = described.get("pre_tokenizer") or {}, described.get("model") or {}
    steps = [step for outer in pre.get("pretokenizers", [pre]) if (step := _step(outer)) is not None]
    name = _NAMES.get(tuple(steps))
    if name is None or model.get("type") != "BPE" or model.get("byte_fallback"):
        raise InputError(
            f"{path}: a {model.get('type')} tokenizer that cuts text by {steps}; --format gguf writes byte-level BPE "
            f"cut as one of {', '.join(CUTS)}: convert the unquantized model with llama.cpp's own "
            "convert_hf_to_gguf.py"
        )
    return name


def _step(step: dict[str, Any]) -> str | None:
    """Return what a step of a pre-tokenizer cuts by, None for one that only maps bytes."""
    kind = step.get("type")
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return str(step["pattern"].get("Regex"))
    if kind == "ByteLevel" and not step.get("add_prefix_space", True):
        return GPT2_WORDS if step.get("use_regex", True) else None
    if kind == "Digits" and step.get("individual_digits"):
        return DIGITS
    return f"another {kind}"
