"""The README.md of a checkpoint: what it is, how it was made, how to run it, where it loads."""

from offload.checkpoint import Recipe
from offload.command import format_bytes
from offload.source import DEFAULT_MODEL_ID

_ASYMMETRIC_NOTE = """
Zero points make this checkpoint asymmetric. transformers needs `dequantize=True` for it, as its default path refuses
packed zero points since compressed-tensors 0.18:

    from transformers import AutoModelForCausalLM, CompressedTensorsConfig
    AutoModelForCausalLM.from_pretrained("{output}", quantization_config=CompressedTensorsConfig(dequantize=True))
"""

_MIXED_NOTE = """
Zero points and two widths are more than transformers reads as of 5.23: its `dequantize=True` takes all for one width.
"""

_SYMMETRIC_NOTE = """
In plain transformers, with the `compressed-tensors` package installed:

    from transformers import AutoModelForCausalLM
    AutoModelForCausalLM.from_pretrained("{output}")
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
    note = (_SYMMETRIC_NOTE if recipe.symmetric else _MIXED_NOTE if recipe.wide else _ASYMMETRIC_NOTE).format(
        output=output
    )
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
{note}
In vLLM: `vllm serve {output}` (format `pack-quantized`; not tried here).
""".encode()
