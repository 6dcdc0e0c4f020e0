"""Compile every GPU kernel without a GPU and refuse what would run badly. `python -m kernels.ahead_of_time`

For compute capabilities 8.0, 9.0 and 10.0: no register spills, tensor-core instructions in the fused kernel, at most 4
instructions a weight where it decodes, shared memory within what every such device has. Prints a table; exits 1 if a
gate fails.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.kv_block import BLOCK_TOKENS, MOST_FUSED_QUERIES
from kernels.triton_attention import AttentionTile, head_block
from kernels.triton_attention_kernels import append_kernel, attention_kernel, merge_kernel
from kernels.triton_kernels import dequantize_kernel, matmul_kernel, read_kernel, reduce_kernel, sums_kernel
from kernels.triton_step import DENSE_ROWS, DENSE_STAGES, dense_step, norm_warps
from kernels.triton_step_kernels import (
    add_kernel,
    dense_attention_kernel,
    gate_kernel,
    load_kernel,
    norm_kernel,
    place_kernel,
)
from kernels.triton_tuning import TUNINGS, Tile

_CAPABILITIES = (80, 90, 100)
_HEAD_DIMS = (64, 128)
_HIDDENS = (2048, 5120, 16384)
_BITS_AND_GROUPS = ((4, 0), (4, 32), (4, 64), (4, 128), (8, 0), (8, 128))
_SHARED_LIMIT_BYTES = 99 << 10
_MULTIPLES_OF_16 = ("N", "K", "row_bytes")
_MOST_INSTRUCTIONS = 4.0
_MOST_IN_SHORT_STEPS = {False: 4.3, True: 5.6}
"""Where groups are of 32, whose steps share less: without zero points and with them."""

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_LABEL = re.compile(r"^\s*\.?(\.L_[\w.]+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+\S")
_BRANCH = re.compile(r"\bBRA\b.*`\((\.L_[\w.]+)\)")
_TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|UTCHMMA|UTCQMMA|IMMA)\b")


@dataclass(frozen=True, slots=True)
class Configuration:
    """A kernel as it is launched: its name, the types of its arguments, its compile-time values and its warps.

    loop_weights: weights that one turn of its loop multiplies, None where instructions are not counted against them.
    most_instructions: for each of those weights, which decoding 4 bits has a limit of; None for no limit.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    loop_weights: int | None = None
    most_instructions: float | None = None


@dataclass(frozen=True, slots=True)
class Compiled:
    """What came out: registers of a thread, bytes spilled, shared memory in bytes, tensor-core instructions.

    loop_instructions: those of one turn of the loop around the tensor cores, in all threads, for each of its weights.
    """

    name: str
    capability: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_core_instructions: int
    loop_instructions: float | None = None

    def failures(self, fused: bool, most_instructions: float | None) -> list[str]:
        """Name the gates this one does not pass; see `Configuration.most_instructions`."""
        failed = []
        if self.spilled_bytes:
            failed.append(f"{self.spilled_bytes} bytes spilled")
        if fused and not self.tensor_core_instructions:
            failed.append("no tensor-core instruction")
        counted = self.loop_instructions
        if most_instructions is not None and counted is not None and counted > most_instructions:
            failed.append(f"{counted:.2f} instructions a weight")
        if self.shared_bytes > _SHARED_LIMIT_BYTES:
            failed.append(f"{self.shared_bytes} bytes of shared memory")
        return failed


def configurations(capability: int) -> Iterator[Configuration]:
    """Yield every configuration that kernels.triton_matmul launches there, at 16 bits and in whole steps.

    Codes of 8 bits, which are not gated, are there in their longest groups and whole rows alone.
    """
    tuning = TUNINGS[capability // 10]
    yield _configuration("read", read_kernel, {"words": "*i32", "sums_P": "*i32"}, {"BLOCK": 1024}, 4, 1)
    for dtype in ("fp16", "bf16"):
        for (bits, group), has_zero in product(_BITS_AND_GROUPS, (False, True)):
            zero = {"zero_NC": "*i32"} if has_zero else {}
            pointers = {"codes_NK": "*u8", "scale_NC": f"*{dtype}", **zero}
            constants: dict[str, Any] = {"BITS": bits, "GROUP": group, "HAS_ZERO": has_zero}
            constants |= {} if has_zero else {"zero_NC": None}
            label = f"int{bits}, {dtype}, group {group or 'row'}, {'zero' if has_zero else 'symmetric'}"
            for tile in (*tuning.tiles, tuning.mapped):
                yield _fused(tile, label, dtype, pointers, constants)
            arguments = {**pointers, "out_NK": f"*{dtype}"}
            yield _configuration(f"dequantize, {label}", dequantize_kernel, arguments, constants | {"STEP": 1024}, 4, 1)
        splits = {"SPLITS": 16, "BLOCK": 1024, "HAS_BIAS": True}
        arguments = {"partial_SMN": "*fp32", "bias_N": f"*{dtype}", "out_MN": f"*{dtype}"}
        yield _configuration(f"reduce, {dtype}", reduce_kernel, arguments, splits, 4, 1)
        summed = {"x_MK": f"*{dtype}", "sum_MS": "*fp32"}
        yield _configuration(f"sums, {dtype}", sums_kernel, summed, {"STEP": 128, "STEPS": 8}, 1, 3)
        for dim in _HEAD_DIMS:
            yield from _attention(dtype, dim)
            yield from _heads_of_a_step(dtype, dim)
        yield from _vectors_of_a_step(dtype)


def _fused(tile: Tile, label: str, dtype: str, pointers: dict[str, str], constants: dict[str, Any]) -> Configuration:
    step = tile.step(constants["GROUP"], constants["BITS"])
    constants = constants | {
        "STEP": step,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "WHOLE_STEPS": True,
        "SCALE_WEIGHTS": tile.scale_weights,
        "HAS_BIAS": False,
        "PTX": True,
        "bias_N": None,
    }
    sums = "x_sum_MS"
    summed = constants["HAS_ZERO"] and not tile.scale_weights
    constants |= {} if summed else {sums: None}
    arguments = {"x_MK": f"*{dtype}", sums: "*fp32", **pointers, "out_SMN": "*fp32"}
    kind = "mapped" if tile.scale_weights else "matmul"
    made = _configuration(
        f"{kind} {tile.block_m}x{tile.block_n}x{tile.largest_step}, {label}",
        matmul_kernel,
        arguments,
        constants,
        tile.num_warps,
        tile.num_stages,
    )
    if tile.scale_weights:  # what crosses the bus is bound by it
        return made
    limit = None
    if constants["BITS"] == 4 and tile.block_m == 16:
        limit = _MOST_INSTRUCTIONS if step >= 64 else _MOST_IN_SHORT_STEPS[constants["HAS_ZERO"]]
    return replace(made, loop_weights=tile.block_n * step, most_instructions=limit)


def _attention(dtype: str, dim: int) -> Iterator[Configuration]:
    """Yield what attention over 8-bit keys and values launches for heads of `dim` elements."""
    label = f"{dtype}, heads of {dim}"
    arguments = {"query_BHND": f"*{dtype}", "addresses": "*i64", "scaling_log2": "fp32"}
    arguments |= {"out_SBNHD": "*fp32", "logsum_SBNH": "*fp32"}
    kinds = [*product((1, MOST_FUSED_QUERIES + 1), ("causal", "masked")), (1, "replayed")]
    for queries, kind in kinds:
        masked, replayed = kind == "masked", kind == "replayed"
        tile = AttentionTile.of(dim, dim, queries)
        constants: dict[str, Any] = {"KEY_DIM": dim, "VALUE_DIM": dim, "BLOCK_TOKENS": BLOCK_TOKENS, "PTX": True}
        constants |= {"KEY_BLOCK": tile.key_block, "VALUE_BLOCK": tile.value_block, "STEP": tile.step_tokens}
        constants |= {"GROUP": 4, "BLOCK_M": tile.rows, "HAS_MASK": masked, "TOKENS_IN_MEMORY": replayed}
        constants |= {} if masked else {"mask_BNT": None}
        more = ({"mask_BNT": "*u8"} if masked else {}) | ({"tokens": "*i32"} if replayed else {})
        name = f"attention of {tile.rows} rows, {label}, {kind}"
        yield _configuration(name, attention_kernel, arguments | more, constants, tile.num_warps, tile.num_stages)
    merged = {"part_SRD": "*fp32", "logsum_SR": "*fp32", "out_RD": f"*{dtype}"}
    sizes = {"VALUE_DIM": dim, "VALUE_BLOCK": tile.value_block}
    yield _configuration(f"merge, {label}", merge_kernel, merged, sizes, 1, 3)
    written = {"x_BKND": f"*{dtype}", "offset_KD": "*fp32", "addresses": "*i64"}
    sizes = {"DIM": dim, "BLOCK": tile.key_block, "BLOCK_TOKENS": BLOCK_TOKENS, "HAS_OFFSET": True}
    yield _configuration(f"append, {label}", append_kernel, written, sizes, 1, 3)


def _heads_of_a_step(dtype: str, dim: int) -> Iterator[Configuration]:
    """Yield what a decode step launches for heads of `dim` elements, beside attention over 8-bit keys and values."""
    label, block = f"{dtype}, heads of {dim}", head_block(dim)
    room = {"table": "*i64", "tokens_in_room": "*i32"}
    kind = "*" + dtype
    for int8 in (False, True):
        vectors = {name: kind for name in ("qkv_HD", "query_norm_D", "key_norm_D", "cos", "sin", "query_HD")}
        arguments = {**vectors, **room, "epsilon": "fp32"} | ({"offset_KD": "*fp32"} if int8 else {})
        sizes = {"HEADS": 32, "KEY_HEADS": 8, "DIM": dim, "ROTARY": dim, "BLOCK": block, "BLOCK_TOKENS": BLOCK_TOKENS}
        kinds = {"HAS_QUERY_NORM": True, "HAS_KEY_NORM": True, "HAS_OFFSET": int8, "INT8": int8}
        constants = {**sizes, **kinds} | ({} if int8 else {"offset_KD": None})
        yield _configuration(
            f"place {'in 8 bits' if int8 else 'dense'}, {label}", place_kernel, arguments, constants, 1, 3
        )
    arguments = {"query_HD": kind, **room, "out_SHD": "*fp32", "logsum_SH": "*fp32", "scaling_log2": "fp32"}
    constants = {"GROUP": 4, "DIM": dim, "BLOCK": block, "STEP": dense_step(dim, 2), "BLOCK_M": DENSE_ROWS}
    yield _configuration(f"dense attention, {label}", dense_attention_kernel, arguments, constants, 4, DENSE_STAGES)


def _vectors_of_a_step(dtype: str) -> Iterator[Configuration]:
    """Yield what a decode step launches for vectors as wide as the residual stream or the MLP."""
    kind = "*" + dtype
    names = ("hidden_D", "cos", "sin", "hidden_in_room_D", "cos_in_room", "sin_in_room")
    arguments = {name: kind for name in names} | {"past": "*i64", "table": "*i64", "tokens_in_room": "*i32"}
    yield _configuration(f"load, {dtype}", load_kernel, arguments, {"BLOCK": 1024}, 4, 3)
    for hidden, added in product(_HIDDENS, (False, True)):
        block = triton.next_power_of_2(hidden)
        arguments = {name: kind for name in ("x_D", "norm_D", "sum_D", "out_D")} | {"epsilon": "fp32"}
        arguments |= {"added_D": kind} if added else {}
        constants = {"D": hidden, "BLOCK": block, "HAS_ADDED": added} | ({} if added else {"added_D": None})
        name = f"norm of {'a sum of ' if added else ''}{hidden}, {dtype}"
        yield _configuration(name, norm_kernel, arguments, constants, norm_warps(block), 3)
    yield _configuration(f"gate, {dtype}", gate_kernel, {"gate_up_D": kind, "out_D": kind}, {"BLOCK": 1024}, 4, 3)
    added_up = {name: kind for name in ("x_D", "y_D", "out_D")}
    yield _configuration(f"add, {dtype}", add_kernel, added_up, {"BLOCK": 1024}, 4, 3)


def _configuration(
    name: str, kernel: Any, pointers: dict[str, str], constants: dict[str, Any], num_warps: int, num_stages: int
) -> Configuration:
    """Complete a signature: what is neither a pointer nor a constant is a 32-bit integer."""
    signature = {key: "constexpr" if key in constants else pointers.get(key, "i32") for key in kernel.arg_names}
    return Configuration(name, kernel, signature, constants, num_warps, num_stages)


def compile_one(configuration: Configuration, capability: int) -> Compiled:
    """Compile for one compute capability and read the machine code."""
    source = ASTSource(
        fn=configuration.kernel,
        signature=configuration.signature,
        constexprs=configuration.constants,
        attrs={
            (index,): [["tt.divisibility", 16]]
            for index, (name, kind) in enumerate(configuration.signature.items())
            if "*" in kind or name in _MULTIPLES_OF_16
        },
    )
    options = {
        "num_warps": configuration.num_warps,
        "num_stages": configuration.num_stages,
        "enable_fp_fusion": True,
    }
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "-res-usage", cubin.name)
        code = _tool("nvdisasm", "-c", cubin.name)
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Compiled(
        name=configuration.name,
        capability=capability,
        registers=numbers["REG"],
        spilled_bytes=len(re.findall(r"\b(?:STL|LDL)\b", code)) and numbers["STACK"] + numbers["LOCAL"],
        shared_bytes=compiled.metadata.shared,
        tensor_core_instructions=len(_TENSOR_CORE.findall(code)),
        loop_instructions=None
        if configuration.loop_weights is None
        else loop_length(code) * 32 * configuration.num_warps / configuration.loop_weights,
    )


def loop_length(code: str) -> int:
    """Return the instructions in the loop that holds most tensor-core instructions, from a disassembly.

    A loop is what lies between a label and a branch back to it. Raises ValueError if none holds such an instruction.
    """
    lines = [line for line in code.splitlines() if _LABEL.match(line) or _INSTRUCTION.search(line)]
    starts = {match[1]: number for number, line in enumerate(lines) if (match := _LABEL.match(line))}
    loops = []
    for number, line in enumerate(lines):
        target = _BRANCH.search(line)
        if target and starts.get(target[1], number) < number:
            body = [text for text in lines[starts[target[1]] : number + 1] if _INSTRUCTION.search(text)]
            loops.append((sum(bool(_TENSOR_CORE.search(text)) for text in body), -len(body)))
    products, length = max(loops, default=(0, 0))
    if not products:
        raise ValueError("no loop around a tensor-core instruction")
    return -length


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def main() -> int:
    """Compile everything, print the table, and return 1 if a gate failed."""
    pairs = [(c, capability) for capability in _CAPABILITIES for c in configurations(capability)]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda pair: compile_one(*pair), pairs))
    print("| kernel | sm | registers | spilled | shared | tensor-core instructions | instructions a weight | |")
    print("|---|---|---|---|---|---|---|---|")
    failed = 0
    for (configuration, _), result in zip(pairs, results, strict=True):
        fused = configuration.kernel in (matmul_kernel, attention_kernel, dense_attention_kernel)
        failures = result.failures(fused, configuration.most_instructions)
        failed += bool(failures)
        print(
            f"| {result.name} | {result.capability} | {result.registers} | {result.spilled_bytes} "
            f"| {result.shared_bytes} | {result.tensor_core_instructions} "
            f"| {'-' if result.loop_instructions is None else f'{result.loop_instructions:.2f}'} "
            f"| {'; '.join(failures) or 'ok'} |"
        )
    print(f"{len(results)} compiled, {failed} failed", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
