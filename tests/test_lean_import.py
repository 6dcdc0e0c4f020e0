"""Commands import of transformers what they use; the compiler that is put off comes whole; a library's user has all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import CALIBRATION_TEXT

ROOT = Path(__file__).parents[1]
HEAVY = "{'sympy', 'torch._dynamo', 'torch._inductor', 'torch.distributed.tensor', 'triton', 'scipy', 'sklearn'}"


def run(code: str, *arguments: str) -> str:
    """Run code in a process of its own and return what it prints."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=200)
    assert result.returncode == 0, result.stderr
    return result.stdout


def heavy_after(module: str, *arguments: str) -> str:
    """Run a command as `python -m` does, and return what it imported of what it does not need."""
    told = f"print(sorted({HEAVY} & set(sys.modules)))"
    code = f"import sys\nfrom {module} import main\nassert main(sys.argv[1:]) == 0\n{told}"
    return run(code, *arguments).splitlines()[-1]


def test_running_a_checkpoint_imports_no_compiler(tiny_checkpoint: Path) -> None:
    flags = ["--model", str(tiny_checkpoint), "--max-new-tokens", "4", "--device-map", "disk"]
    assert heavy_after("offload.generate", *flags, "--prompt", "the quick", "--no-chat") == "[]"


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_calibrating_imports_no_compiler(method: str, tiny_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(CALIBRATION_TEXT)
    flags = ["--model", str(tiny_model), "--output", str(tmp_path / "out"), "--group-size", "32"]
    few = ["--calibration", str(text), "--num-samples", "8", "--seq-len", "32"]
    assert heavy_after(f"quant.{method}", *flags, *([] if method == "rtn" else few)) == "[]"


REGISTERED = """
import sys
import torch
from offload.lean_import import import_lean
genuine = torch.compiler.disable
import_lean()
import transformers
assert torch.compiler.disable is not genuine

@torch.compiler.disable
def disabled(x): return x + 1

@torch.compiler.disable(recursive=False)
def disabled_alone(x): return x + 1

@torch._dynamo.allow_in_graph
def whole(x):
    print("in the graph", end="")  # what the compiler cannot look through
    return x + 1

@torch._dynamo.assume_constant_result
def constant(): return 3

x = torch.ones(2)
assert disabled(x).tolist() == disabled_alone(x).tolist() == whole(x).tolist() == [2, 2]
assert constant() == 3
assert "torch._dynamo" not in sys.modules
"""

COMPILED = """
def compiled(function):
    return torch.compile(function, backend="eager", fullgraph=True)

assert compiled(lambda x: whole(x) * constant())(x).tolist() == [6, 6]
for function in (disabled, disabled_alone):
    try:
        compiled(lambda x: function(x) * 2)(x)
    except torch._dynamo.exc.Unsupported:
        assert function(x).tolist() == [2, 2]
    else:
        raise AssertionError("what was disabled was compiled")
assert torch.compiler.disable is genuine
assert type(torch._dynamo).__name__ == "module"
"""


@pytest.mark.parametrize("first", ["", "torch._dynamo.config", "import torch._dynamo", "import torch._dynamo.utils"])
def test_the_compiler_comes_whole(first: str) -> None:
    """However it is first asked for, functions that were registered before are treated as they were to be."""
    run(f"{REGISTERED}{first}\n{COMPILED}")


def test_masks_are_made_without_it_and_with_it() -> None:
    """One class, of one module, before the compiler is there and after."""
    run(
        "import sys\nfrom offload.lean_import import import_lean\nimport_lean()\n"
        "import transformers.masking_utils as m\n"
        "assert 'torch._dynamo' not in sys.modules\n"
        "import torch._dynamo._trace_wrapped_higher_order_op as whole, torch._dynamo\n"
        "assert whole.TransformGetItemToIndex is m.TransformGetItemToIndex\n"
        "assert torch._dynamo._trace_wrapped_higher_order_op is whole"
    )


def test_who_only_imports_the_package_has_all_of_transformers() -> None:
    run(
        "import offload, offload.executor\n"
        "from transformers.utils.import_utils import is_torch_distributed_available\n"
        "assert is_torch_distributed_available()\n"
        "import sys\n"
        "assert 'torch._dynamo' in sys.modules"
    )


def test_nothing_changes_once_transformers_is_there() -> None:
    run(
        "import transformers\nfrom offload.lean_import import import_lean\nimport_lean()\n"
        "import transformers.modeling_utils, torch\n"
        "assert transformers.utils.import_utils.is_torch_distributed_available()\n"
        "assert type(torch._dynamo).__name__ == 'module'"
    )
