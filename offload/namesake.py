"""Hugging Face's distribution `kernels`, which transformers imports, beside our package of that name.

Either may come first on the search path, or be imported first, and a wheel of ours installed into the same directory
writes over its `__init__.py`. Our modules bear none of its names, so whichever is `kernels` can carry the other.
"""

import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

_OURS = Path(__file__).parents[1] / "kernels"

CURE = "pip uninstall kernels, then install int4-offload anew if it came by pip; each in its own environment lasts"
"""For what `what_is_wrong` finds."""


def claim() -> None:
    """Have the modules of our package found under `kernels`, whichever comes first; imports nothing else."""
    loaded = sys.modules.get("kernels")
    if loaded is not None:
        if str(_OURS) not in loaded.__path__:
            loaded.__path__.append(str(_OURS))
        return
    found = find_spec("kernels")
    if found is None or str(_OURS) in (found.submodule_search_locations or ()):
        return
    spec = spec_from_file_location("kernels", _OURS / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["kernels"] = module_from_spec(spec)
    spec.loader.exec_module(module)


def installed_version() -> str | None:
    """Return the version of Hugging Face's distribution that is installed, None without one."""
    try:
        return version("kernels")
    except PackageNotFoundError:
        return None


def what_is_wrong() -> str | None:
    """Return why Hugging Face's package cannot be imported although it is installed, None where nothing is wrong.

    transformers goes by the version in the metadata: where it accepts that, it imports no model without the package.
    """
    found = installed_version()
    if found is None:
        return None
    try:
        from kernels import get_kernel  # noqa: F401
    except ImportError as error:
        return f"Hugging Face's kernels {found} is installed, but cannot be imported ({error})"
    return None
