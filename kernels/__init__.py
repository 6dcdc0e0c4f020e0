"""Int4 kernels: the packed weight and its fused dequant-matmul.

Importing the package imports neither torch nor triton; take what you need from its modules.

Hugging Face ships a distribution of the same name, which transformers looks for and imports. The three lines below keep
the two apart: a version that transformers never accepts, a search path that keeps the other's modules importable, and
a hand-over of unknown names.
"""

from pkgutil import extend_path
from typing import Any

__version__ = "0.0.0"
__path__ = extend_path(__path__, __name__)


def __getattr__(name: str) -> Any:
    """Hand names that are not ours to Hugging Face's `kernels`, where that is installed too."""
    import sys
    from importlib import util
    from pathlib import Path

    # a mere folder `kernels` somewhere on the search path is in __path__ too
    theirs = [file for folder in __path__[1:] if (file := Path(folder, "__init__.py")).is_file()]
    spec = util.spec_from_file_location("kernels._hub", theirs[0]) if theirs and not name.startswith("__") else None
    if spec is None or spec.loader is None:
        raise AttributeError(f"module 'kernels' has no attribute {name!r}")
    if spec.name not in sys.modules:
        module = util.module_from_spec(spec)
        sys.modules[spec.name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[spec.name]  # half of a module would be taken for all of it
            raise
    return getattr(sys.modules[spec.name], name)
