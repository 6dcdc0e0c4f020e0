"""Compile every GPU kernel without a GPU and refuse what would run badly. `python -m kernels.ahead_of_time`

For compute capabilities 8.0, 9.0 and 10.0: no register spills, tensor-core instructions in the fused kernel, shared
memory within what every such device has. Prints a table; exits 1 if a gate fails.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.triton_matmul import TILES, dequantize_kernel, matmul_kernel

_CAPABILITIES = (80, 90, 100)
_SHARED_LIMIT_BYTES = 99 << 10
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|UTCHMMA|UTCQMMA|IMMA)\b")


@dataclass(frozen=True, slots=True)
class Configuration:
    """A kernel as it is launched: its name, the types of its arguments, its compile-time values and its warps."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class Compiled:
    """What came out: registers of a thread, bytes spilled, shared memory in bytes, tensor-core instructions."""

    name: str
    capability: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_core_instructions: int

    def failures(self, fused: bool) -> list[str]:
        """Name the gates this one does not pass."""
        failed = []
        if self.spilled_bytes:
            failed.append(f"{self.spilled_bytes} bytes spilled")
        if fused and not self.tensor_core_instructions:
            failed.append("no tensor-core instruction")
        if self.shared_bytes > _SHARED_LIMIT_BYTES:
            failed.append(f"{self.shared_bytes} bytes of shared memory")
        return failed


def configurations() -> Iterator[Configuration]:
    """Yield every configuration that kernels.triton_matmul launches, for activations of 16 bits."""
    for dtype in ("fp16", "bf16"):
        for group in (0, 32, 64, 128):
            for has_zero in (False, True):
                zero = "*i32" if has_zero else "constexpr"
                shared: dict[str, Any] = {
                    "GROUP": group,
                    "HAS_ZERO": has_zero,
                    **({} if has_zero else {"zero_NC": None}),
                }
                label = f"{dtype}, group {group or 'row'}, {'zero' if has_zero else 'symmetric'}"
                weight = {"codes_NK": "*u8", "scale_NC": f"*{dtype}", "zero_NC": zero}
                for tile in TILES:
                    arguments = {"x_MK": f"*{dtype}", **weight, "bias_N": "constexpr", "out_MN": f"*{dtype}"}
                    constants: dict[str, Any] = {
                        "STEP": tile.step(group),
                        "BLOCK_M": tile.block_m,
                        "BLOCK_N": tile.block_n,
                    }
                    constants |= {"HAS_BIAS": False, "bias_N": None}
                    name = f"matmul {tile.block_m}x{tile.block_n}, {label}"
                    yield _configuration(
                        name, matmul_kernel, arguments, shared | constants, tile.num_warps, tile.num_stages
                    )
                arguments = {**weight, "out_NK": f"*{dtype}"}
                yield _configuration(
                    f"dequantize, {label}", dequantize_kernel, arguments, shared | {"STEP": 1024}, 4, 1
                )


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
            for index, kind in enumerate(configuration.signature.values())
            if "*" in kind
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
    )


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def main() -> int:
    """Compile everything, print the table, and return 1 if a gate failed."""
    pairs = [(c, capability) for c in configurations() for capability in _CAPABILITIES]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda pair: compile_one(*pair), pairs))
    print("| kernel | sm | registers | spilled | shared | tensor-core instructions | |")
    print("|---|---|---|---|---|---|---|")
    failed = 0
    for (configuration, _), result in zip(pairs, results, strict=True):
        failures = result.failures(configuration.kernel is matmul_kernel)
        failed += bool(failures)
        print(
            f"| {result.name} | {result.capability} | {result.registers} | {result.spilled_bytes} "
            f"| {result.shared_bytes} | {result.tensor_core_instructions} | {'; '.join(failures) or 'ok'} |"
        )
    print(f"{len(results)} compiled, {failed} failed", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
