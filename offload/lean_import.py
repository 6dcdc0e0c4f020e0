"""transformers without what no command here uses of it: torch's compiler, tensors spread over processes, and scipy.

It imports them to register functions with the compiler, to know the class of such tensors, and for losses. Without them
a process that runs a checkpoint holds 75 MiB less of its own and 40 MiB less of libraries, and starts 1.2 s sooner.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from inspect import isfunction
from pathlib import Path
from types import ModuleType
from typing import Any

from offload.import_hooks import around_import

_ASKED = "transformers.utils.import_utils"
_LEFT_OUT = ("is_torch_distributed_available", "is_scipy_available", "is_sklearn_available")
"""What transformers asks before it imports: what these stand for is used for training, and to spread a model."""

_COMPILER = "torch._dynamo"
_REGISTERING = ("allow_in_graph", "assume_constant_result", "disable")
_APART = "_trace_wrapped_higher_order_op"
"""The one module of the compiler that is used without compiling, for masks; it needs nothing else of the compiler."""


def import_lean() -> None:
    """Have transformers, when it is imported, leave out what commands do not use; imports nothing itself.

    For a process that is all ours: who trains beside `offload`, or spreads a model, needs what is left out. Nothing
    happens where transformers has been imported already. The compiler comes whole as soon as anyone imports or uses it.
    """
    if _ASKED not in sys.modules:
        around_import(_ASKED, _lean)


@contextmanager
def _lean(import_utils: ModuleType) -> Iterator[None]:
    yield
    for name in _LEFT_OUT:
        if hasattr(import_utils, name):  # transformers of another version may ask otherwise, and imports more then
            setattr(import_utils, name, _no)
    import torch

    if _COMPILER not in sys.modules:
        _defer_compiler(torch)


def _no() -> bool:
    return False


def _defer_compiler(torch: Any) -> None:
    """Put a stand-in where torch has its compiler, until that is imported."""
    apart = _import_apart(torch)
    deferred, public = _Deferred(), {name: getattr(torch.compiler, name) for name in _REGISTERING}

    @contextmanager
    def imported(compiler: ModuleType) -> Iterator[None]:
        if vars(torch).get("_dynamo") is deferred:
            del torch._dynamo
        for name, function in public.items():
            setattr(torch.compiler, name, function)
        setattr(compiler, _APART, apart)
        yield
        deferred.register(compiler)

    torch._dynamo = deferred
    for name in public:
        setattr(torch.compiler, name, getattr(deferred, name))
    around_import(_COMPILER, imported)


def _import_apart(torch: Any) -> ModuleType:
    name = f"{_COMPILER}.{_APART}"
    spec = spec_from_file_location(name, Path(torch.__file__).parent / "_dynamo" / f"{_APART}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


class _Deferred:
    """Notes what is registered with the compiler; whatever else is asked of it imports the compiler."""

    def __init__(self) -> None:
        self._noted: list[tuple[str, Callable[..., Any]]] = []
        self._compiler: Any = None

    def register(self, compiler: Any) -> None:
        """Register what was noted with the compiler, which is here now."""
        self._compiler = compiler
        for name, function in self._noted:
            getattr(compiler, name)(function)

    def allow_in_graph(self, fn: Any) -> Any:
        """Return the function as it is, as the compiler does."""
        return self._note("allow_in_graph", fn)

    def assume_constant_result(self, fn: Any) -> Any:
        """Return the function as it is, as the compiler does."""
        return self._note("assume_constant_result", fn)

    def disable(self, fn: Any = None, recursive: bool = True, **options: Any) -> Any:
        """Return a function that is `fn` until there is a compiler, and then what that makes of it."""
        if fn is None and not recursive:
            return partial(self.disable, recursive=recursive, **options)
        if not isfunction(fn):
            return import_module(_COMPILER).disable(fn, recursive, **options)
        disabled: list[Any] = []

        @wraps(fn)
        def call(*arguments: Any, **keywords: Any) -> Any:
            if self._compiler is None:
                return fn(*arguments, **keywords)
            if not disabled:
                disabled.append(self._compiler.disable(fn, recursive, **options))
            return disabled[0](*arguments, **keywords)

        return call

    def _note(self, name: str, fn: Any) -> Any:
        if not isfunction(fn):
            return getattr(import_module(_COMPILER), name)(fn)
        self._noted.append((name, fn))
        return fn

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(_COMPILER), name)
