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
    if name.startswith("__") or len(__path__) == 1:
        raise AttributeError(f"module 'kernels' has no attribute {name!r}")
    import sys
    from importlib import util

    spec = util.spec_from_file_location("kernels._hub", f"{__path__[1]}/__init__.py")
    if spec is None or spec.loader is None:
        raise AttributeError(f"module 'kernels' has no attribute {name!r}")
    if spec.name not in sys.modules:
        module = util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    return getattr(sys.modules[spec.name], name)
