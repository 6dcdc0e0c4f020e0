"""The README.md of what is exported: what it holds, what opens it, with which version that was tried, what breaks."""

from offload.checkpoint import MANIFEST_NAME, Checkpoint
from offload.files import read_json
from quant.layouts import CACHES, FORMATS, Layout
from quant.model_card import COMPRESSED_TENSORS, LISTS, breaks, known_breaks, parted

GPTQMODEL = "transformers 5.23 with gptqmodel 7.7"
"""What AWQ's and GPTQ's layout were opened with."""

LLAMA_CPP = "llama-cpp-python 0.3.36"
"""What GGUF files were opened with."""


def export_card(checkpoint: Checkpoint, layout: Layout) -> bytes:
    """Return the card of a checkpoint in a layout, as UTF-8."""
    return (_cache_card(checkpoint, layout) if layout.name in CACHES else _weights_card(checkpoint, layout)).encode()


def gguf_description(checkpoint: Checkpoint) -> str:
    """Return what a GGUF file says of itself, which has no card beside it."""
    minima = "" if checkpoint.recipe.symmetric else " Minima, -z * s, are rounded to float16."
    return (
        f"{_made(checkpoint)}; codes and scales are those of the original checkpoint.{minima} "
        f"Calibrated keys and values are left out. For llama.cpp; tried: {LLAMA_CPP} on a CPU. int4-offload reads it "
        "back, but not the rope scaling of Llama 3 and biases of Llama's attention."
    )


def _made(checkpoint: Checkpoint) -> str:
    recipe = checkpoint.recipe
    group = "one group a row" if recipe.group_size is None else f"groups of {recipe.group_size}"
    kind = "symmetric" if recipe.symmetric else "with zero points"
    return f"{recipe.bits} bits in {group}, {kind}, made by {recipe.method}"


def _weights_card(checkpoint: Checkpoint, layout: Layout) -> str:
    recipe = checkpoint.recipe
    near = "to 1e-4" if recipe.symmetric else "within 0.1%"
    if recipe.bits == 8 or recipe.group_size is None:
        near = "within 0.2%" if recipe.group_size else "within 2%"
    lines = ["runtimes that force float16 round norms and embeddings in bfloat16"]
    if layout.name == "gptq" and not recipe.symmetric:
        lines.append("vLLM: its kernels take no zero points in this layout (`sym: false`); in AWQ's they do")
    if halves := parted(recipe.ignore):
        lines.append(f"vLLM and SGLang: they join {', '.join(halves)}, of which a part is not quantized")
    return f"""# {checkpoint.directory.name}, for {FORMATS[layout.name]}

{_made(checkpoint)}: the codes, zero points and scales of the original
checkpoint, re-laid; nothing was rounded. Calibrated keys and values are left out.

## What opens it

| | tried | |
|---|---|---|
| this toolkit | yes | re-laid once when it is opened, logits equal bit for bit |
| {GPTQMODEL}, on a CPU | yes | the logits of this toolkit, {near} of the largest |
| vLLM, SGLang | no | {LISTS} |

{breaks(lines)}
"""


def _cache_card(checkpoint: Checkpoint, layout: Layout) -> str:
    recipe = checkpoint.recipe
    kind, largest = CACHES[layout.name]
    scheme = layout.config["kv_cache_scheme"]
    calibration = read_json(checkpoint.directory / MANIFEST_NAME)["kv_calibration"]
    seen = (
        f"{calibration.get('num_samples')} windows of {calibration.get('seq_len')} tokens of {calibration.get('text')}"
    )
    each = "head" if scheme["strategy"] == "attn_head" else "layer"
    here = "re-laid once when it is opened, less the scales, which it says; logits equal bit for bit"
    if recipe.wide:
        here = "refuses weights of two widths that have no manifest; open the original checkpoint"
    rounds = "rounds keys and values to it and back in every layer, in their own dtype: it saves no memory"
    if not recipe.symmetric:
        rounds = "opens only with `dequantize=True`, and then leaves the scales out (it lists them as UNEXPECTED)"
    vllm = "its cache becomes fp8 without being asked, with these scales; queries get none"
    sglang = "its cache becomes fp8 without being asked, where `--kv-cache-dtype` is left at auto"
    if kind == "int":
        vllm = "takes the scheme for one of its own: its cache becomes **fp8, not int8**, without being asked"
        sglang = "has no such cache, and serves an unquantized one without a word"
    if each == "head":
        vllm += "; refuses it where its attention backend takes no scale a head"
    return f"""# {checkpoint.directory.name}, with scales of an {"fp8" if kind == "float" else "int8"} cache

The weights are those of the original checkpoint, byte for byte. `kv_scales.safetensors` holds `k_scale` and `v_scale`,
one a {each}: the largest magnitude on {seen}, over {largest:g}.
`kv_cache_scheme` in `config.json` tells runtimes of them: type {kind}, 8 bits, strategy {scheme["strategy"]}. Larger
magnitudes than calibration saw are clipped.

## What each runtime does with it

| | tried | |
|---|---|---|
| this toolkit | yes | {here} |
| {COMPRESSED_TENSORS}, on a CPU | yes | {rounds} |
| vLLM | no, its source was read | {vllm} |
| SGLang | no, its source was read | {sglang} |

In vLLM `--kv-cache-dtype` with the model's own dtype keeps the cache as it was; releases in which the scheme overrides
the flag need the original checkpoint.

{known_breaks(recipe)}
"""
