"""Hugging Face's `kernels` beside ours, of a version that transformers accepts: whichever is first, both are found."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from offload import namesake

ROOT = Path(__file__).parents[1]
THEIRS = """
import sys
from unittest.mock import MagicMock
sys.theirs = True
def _same(*_):
    return lambda decorated: decorated
use_kernel_forward_from_hub = use_kernelized_func = use_kernel_func_from_hub = _same
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return MagicMock()
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A directory for the search path with that distribution in it."""
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    site = tmp_path / "site"
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text(THEIRS)
    (site / f"kernels-{KERNELS_MIN_VERSION}.dist-info").mkdir()
    metadata = f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n"
    (site / f"kernels-{KERNELS_MIN_VERSION}.dist-info" / "METADATA").write_text(metadata)
    return site


def run(code: str, *search_path: Path) -> str:
    """Run `code` in a new interpreter, elsewhere; return what it said on stderr."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, search_path)), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, check=False, timeout=200)
    assert result.returncode == 0, result.stderr
    return result.stderr


@pytest.mark.parametrize("first", ["import offload", "import quant", "from transformers import LlamaForCausalLM"])
def test_theirs_first_on_the_search_path_hides_nothing_of_ours(first: str, site: Path) -> None:
    run(
        f"""
{first}
import sys
heavy = {{"torch", "transformers", "numpy"}} & {{name.partition(".")[0] for name in sys.modules}}
assert not heavy or "transformers" in {first!r}, heavy
import offload
from kernels.packed import PackedWeight
import offload.executor, quant.walk, eval.likelihood
import kernels
from transformers import LlamaForCausalLM
from transformers.utils import is_kernels_available
assert is_kernels_available()
assert kernels.get_kernel
assert sys.theirs
""",
        site,
        ROOT,
    )


@pytest.mark.skipif(namesake.installed_version() is not None, reason="the one that is installed would be imported")
def test_what_cannot_be_imported_is_said_with_its_cure(site: Path) -> None:
    """As when a wheel of ours was unpacked over theirs: the metadata is there, the package is not."""
    (site / "kernels" / "__init__.py").unlink()
    said = run(
        """
from offload import doctor, verify
finding = doctor._models()
assert finding.found.startswith("transformers imports none: Hugging Face's kernels "), finding
assert "is installed, but cannot be imported (cannot import name 'get_kernel'" in finding.found, finding
assert finding.cure == doctor.CURE
assert verify.main(["--model", "/nowhere"]) == 4
""",
        ROOT,
        site,
    )
    assert said.startswith("error: Hugging Face's kernels ")
    assert said.endswith(f", so transformers imports no model; {namesake.CURE}\n")


def test_nothing_is_wrong_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namesake, "installed_version", lambda: None)
    assert namesake.what_is_wrong() is None
