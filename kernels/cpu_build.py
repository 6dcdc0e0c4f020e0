"""The compiled CPU kernels: those a wheel carries, else compiled once into a per-user cache by the machine's compiler.

A library is named after a hash of its sources and flags, in the cache also of its compiler, so a new version never
meets an old one.
"""

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PREBUILT = Path(__file__).parent / "prebuilt"
"""Where a wheel has the library that its build compiled."""

_SOURCES = Path(__file__).parent / "cpu"
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-pthread")
_AVX2 = ("-mavx2", "-mfma")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni", "-mprefer-vector-width=512")
_AMX = (*_AVX512, "-mavx512vbmi", "-mf16c", "-mamx-tile", "-mamx-int8")
_FLAGS_BY_FILE = {"api.cpp": (), "attention.cpp": (), "decoder.cpp": (), "portable.cpp": (), "relay.cpp": ()}
_X86_FLAGS_BY_FILE = {"avx2.cpp": _AVX2, "avx512.cpp": _AVX512, "amx.cpp": _AMX}


class BuildError(Exception):
    """No compiler was found, it refused the sources, or the system refused what it made."""


def load_library() -> ctypes.CDLL:
    """Return the compiled kernels, building them if nobody has yet. Raises BuildError."""
    prebuilt = PREBUILT / library_name()
    library = prebuilt if prebuilt.exists() else _built_here()
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        advice = "delete it, or point XDG_CACHE_HOME at a folder that may hold programs"
        raise BuildError(f"cannot load {error}; {advice}") from None


def build(library: Path, link_flags: tuple[str, ...] = ()) -> None:
    """Compile every source with its own flags and link them; the library appears under its name complete.

    library: path of the shared object, in a directory that exists. Raises BuildError.
    """
    compiler = find_compiler()
    if compiler is None:
        raise BuildError("no C++ compiler (c++, g++ or clang++) on the PATH")
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        objects = {name: Path(scratch) / f"{name}.o" for name in _files()}

        def compile_one(name: str) -> None:
            flags = [*_FLAGS, *_files()[name]]
            _run([compiler, *flags, "-c", str(_SOURCES / name), "-o", str(objects[name])])

        with ThreadPoolExecutor() as pool:
            list(pool.map(compile_one, objects))
        linked = Path(scratch) / library.name
        _run([compiler, "-shared", "-pthread", *link_flags, "-o", str(linked), *map(str, objects.values())])
        linked.rename(library)


def library_name(compiler: str | None = None) -> str:
    """Return the file name of the library that these sources and flags make, with that compiler if one is named."""
    by = () if compiler is None else (compiler, os.stat(compiler).st_mtime_ns)
    digest = hashlib.sha256(repr((by, _FLAGS, _files())).encode())
    for path in sorted(_SOURCES.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return f"int4-{digest.hexdigest()[:16]}.so"


def _built_here() -> Path:
    """Return the library in the per-user cache; one process builds it, others wait."""
    compiler = find_compiler()
    if compiler is None:
        raise BuildError("no C++ compiler (c++, g++ or clang++) on the PATH")
    directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "int4-offload" / "kernels"
    library = directory / library_name(compiler)
    if library.exists():
        return library
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not library.exists():
                build(library)
    except OSError as error:
        raise BuildError(f"{directory}: {error.strerror}") from None
    return library


def find_compiler() -> str | None:
    """Return the path of a C++ compiler, None if there is none."""
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")


def _files() -> dict[str, tuple[str, ...]]:
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return _FLAGS_BY_FILE | (_X86_FLAGS_BY_FILE if x86 else {})


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise BuildError(f"{' '.join(command[:1])} failed on {command[-3]}: {last}")
