"""Act around the import of a module that others will import, without importing it: what it makes is there to be met."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

Around = Callable[[ModuleType], AbstractContextManager[None]]


def around_import(name: str, around: Around) -> None:
    """Have the code of a module that is not imported yet run within `around(module)`, once; asked again, nothing.

    name: of the module, with its packages. around: what of the module it is handed is there only after its code ran.
    """
    if not any(isinstance(finder, _Finder) and finder.watches(name, around) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(name, around))


class _Finder(MetaPathFinder):
    """Finds the module where it is, and gives it a loader that acts around it; then it is gone."""

    def __init__(self, name: str, around: Around) -> None:
        self._name, self._around = name, around

    def watches(self, name: str, around: Around) -> bool:
        """Return whether it is there for this."""
        return (self._name, self._around) == (name, around)

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the spec of that one module, None for every other."""
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._around)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Any, around: Around) -> None:
        self._loader, self._around = loader, around

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Leave it to the loader that was found."""
        created: ModuleType | None = self._loader.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        """Run the module."""
        with self._around(module):
            self._loader.exec_module(module)
