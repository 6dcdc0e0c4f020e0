"""The README.md of a checkpoint: what it is, how it was made, how to run it, what opens it and what breaks."""

from offload.checkpoint import JOINED, Recipe
from offload.command import format_bytes
from offload.source import DEFAULT_MODEL_ID

COMPRESSED_TENSORS = "transformers 5.23 with compressed-tensors 0.20"
"""What the tests open checkpoints with."""

LISTS = "its names, shapes, dtypes and settings are held to the lists of vLLM's loader"

_IN_TRANSFORMERS = """
In plain transformers, with the `compressed-tensors` package installed:

    from transformers import AutoModelForCausalLM
    AutoModelForCausalLM.from_pretrained("{output}")
"""

_DEQUANTIZED_IN_TRANSFORMERS = """
In plain transformers, with the `compressed-tensors` package installed, dequantized when it is loaded:

    from transformers import AutoModelForCausalLM, CompressedTensorsConfig
    AutoModelForCausalLM.from_pretrained("{output}", quantization_config=CompressedTensorsConfig(dequantize=True))
"""


def model_card(
    name: str, output: str, recipe: Recipe, source_bytes: int, checkpoint_bytes: int, memory_bytes: int
) -> bytes:
    """Return the card as UTF-8. `python -m eval.ppl --record` adds the measured accuracy.

    memory_bytes: what a process needs to run the checkpoint.
    """
    memory_mib = -(-memory_bytes // (1 << 26)) * 64
    group = "one group a row" if recipe.group_size is None else f"groups of {recipe.group_size}"
    kind = "symmetric" if recipe.symmetric else "asymmetric"
    seen = "no calibration"
    if recipe.calibration_name is not None:
        windows = f"{recipe.num_samples} windows of {recipe.seq_len} tokens"
        seen = f"calibrated on {windows} of {recipe.calibration_name} (sha256 {recipe.calibration_sha256})"
    wide = f" ({len(recipe.wide)} linears in 8)" if recipe.wide else ""
    way = _IN_TRANSFORMERS if recipe.symmetric else "" if recipe.wide else _DEQUANTIZED_IN_TRANSFORMERS
    return f"""---
base_model: {recipe.source or DEFAULT_MODEL_ID}
library_name: transformers
pipeline_tag: text-generation
tags: [int{recipe.bits}, {recipe.method}, compressed-tensors]
---
# {name}, {recipe.method.upper()} int{recipe.bits}

Weights of the decoder layers in {recipe.bits} bits{wide}, {kind}, {group};
{seen}, seed {recipe.seed}. Everything else keeps the source's dtype.
{format_bytes(source_bytes)} became {format_bytes(checkpoint_bytes)}. `manifest.json` holds the
whole recipe, a checksum of every tensor and the error of every layer.

## Running it

Streamed, under a memory budget smaller than the model:

    python -m offload.generate --model {output} --cpu-memory {memory_mib}MiB --prompt "..."
{way.format(output=output)}
In vLLM: `vllm serve {output}`. For AWQ's, GPTQ's or llama.cpp's layout, and for scales of calibrated keys and values,
which only this toolkit finds here: `python -m quant.export --help`.

## What opens it

| | tried | |
|---|---|---|
| this toolkit | yes | every tensor is checked at its first read |
{_in_transformers(recipe)}
| vLLM, SGLang | no | format `pack-quantized`; {LISTS} |

{known_breaks(recipe)}
""".encode()


def _in_transformers(recipe: Recipe) -> str:
    """Return the row of the table about transformers."""
    said = (
        "logits equal bit for bit; the first forward makes dense weights of the packed ones, which takes their memory"
    )
    if not recipe.symmetric:
        said = "only with `dequantize=True`, equal bit for bit to weights in the dtype of their scales"
    if not recipe.symmetric and recipe.wide:
        return f"| {COMPRESSED_TENSORS} | yes | does not open it, see below |"
    return f"| {COMPRESSED_TENSORS}, on a CPU | yes | {said} |"


def known_breaks(recipe: Recipe) -> str:
    """Return the section of a card about compressed-tensors' layout."""
    lines = []
    if not recipe.symmetric and recipe.wide:
        lines.append(
            "transformers: zero points and two widths; its default path refuses the zero points and `dequantize=True` "
            "takes all weights for one width"
        )
    elif not recipe.symmetric:
        lines.append("transformers without `dequantize=True`: compressed-tensors since 0.18 refuses packed zero points")
    if not recipe.symmetric:
        lines.append("vLLM and SGLang of before they knew zero points in this format (vllm-project/vllm#14211)")
    if halves := parted(recipe.ignore):
        lines.append(
            f"vLLM and SGLang: they join {', '.join(halves)}, and refuse to where a part of it is not quantized"
        )
    return breaks(lines)


def breaks(lines: list[str]) -> str:
    """Return what is known not to work as a section of a card."""
    return "Known not to work:\n\n" + "\n".join(f"- {line}" for line in lines) if lines else "Nothing is known to fail."


def parted(ignore: tuple[str, ...]) -> list[str]:
    """Return the joins of vLLM that leave out some of what they join and quantize the rest, `qkv_proj` or the like."""
    left = set(ignore)
    found = set()
    for name in ignore:
        parent, _, last = name.rpartition(".")
        for joined, parts in JOINED.items():
            if last in parts and any(f"{parent}.{part}" not in left for part in parts):
                found.add(joined)
    return sorted(found)
