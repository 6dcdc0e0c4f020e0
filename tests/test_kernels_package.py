"""`kernels` is light to import, and lives beside Hugging Face's distribution of the same name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# modules of Hugging Face's `kernels` 0.17, which one of ours of the same name would hide
THEIRS = """
    archs backends benchmark benchmarks cli compat deps hf_hub importer install layer load locking resolver status
    validate variants verify
"""


def run(code: str, *folders: Path) -> None:
    """Run `code` in a new interpreter, elsewhere, with this project and then `folders` on the search path."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, *folders)))}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """An empty folder `kernels`, whose parent can go on the search path."""
    folder = tmp_path / "site" / "kernels"
    folder.mkdir(parents=True)
    return folder


def test_importing_loads_nothing_heavy() -> None:
    run(
        """
import sys
import kernels
heavy = {"torch", "triton", "numpy", "transformers"} & {name.partition(".")[0] for name in sys.modules}
assert not heavy, heavy
assert kernels.__version__ == "0.0.0"
"""
    )


def test_ours_and_theirs_are_both_reachable(other: Path) -> None:
    (other / "__init__.py").write_text(
        "import sys\nsys.loaded = getattr(sys, 'loaded', 0) + 1\n"
        "from kernels.layer import Layer\n__version__ = '0.18.5'\n"
    )
    (other / "layer.py").write_text("from ._inner import secret\n\nclass Layer:\n    value = secret\n")
    (other / "_inner.py").write_text("secret = 42\n")
    (other / "packed.py").write_text("raise AssertionError('ours comes first')\n")
    run(
        """
import sys
import kernels
assert not hasattr(sys, "loaded"), "loaded before it is asked for"
from kernels import Layer
from kernels import packed
from kernels.packed import PackedWeight
import kernels.layer
assert packed.PackedWeight is PackedWeight
assert kernels.Layer is Layer is kernels.layer.Layer
assert Layer.value == 42
assert sys.loaded == 1
assert kernels.__version__ == "0.0.0"
assert not hasattr(kernels, "no_such_name")
""",
        other.parent,
    )


@pytest.mark.parametrize("kind", ["absent", "a mere folder", "a package"])
def test_unknown_names_are_attribute_errors(other: Path, kind: str) -> None:
    if kind == "a package":
        (other / "__init__.py").touch()
    run(
        """
import kernels
from kernels import cpu_build
for name in ("no_such_name", "__no_such_name__"):
    try:
        getattr(kernels, name)
    except AttributeError as error:
        assert f"has no attribute {name!r}" in str(error), error
    else:
        raise AssertionError("found")
""",
        *([] if kind == "absent" else [other.parent]),
    )


def test_theirs_failing_to_load_fails_alike_every_time(other: Path) -> None:
    (other / "__init__.py").write_text("early = 1\nraise ImportError('their dependency is missing')\n")
    run(
        """
import kernels.cpu_build
for name in ("early", "get_kernel", "early"):
    try:
        getattr(kernels, name)
    except ImportError as error:
        assert str(error) == "their dependency is missing"
    else:
        raise AssertionError("found")
""",
        other.parent,
    )


def test_no_module_of_ours_hides_one_of_theirs() -> None:
    ours = {path.stem for path in (ROOT / "kernels").iterdir()}
    assert {"packed", "cpu"} <= ours
    assert not ours & set(THEIRS.split())


def test_transformers_does_not_take_ours_for_theirs() -> None:
    """It goes by the version of the distribution that is installed, of which ours is none."""
    run(
        f"""
from importlib import metadata
from pathlib import Path
import kernels
from packaging.version import Version
from transformers.utils import import_utils
assert Path(kernels.__file__).parents[1] == Path({str(ROOT)!r})
installed = [Version(found.version) for found in metadata.distributions(name="kernels")][:1]
low, high = Version(import_utils.KERNELS_MIN_VERSION), Version(import_utils.KERNELS_MAX_VERSION)
assert import_utils.is_kernels_available() is any(low <= version < high for version in installed)
from transformers import LlamaForCausalLM
"""
    )
