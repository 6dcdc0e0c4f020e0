"""The wheel carries the CPU kernels compiled. Everything else about the project is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent))
from kernels.cpu_build import PREBUILT, BuildError, build, library_name

# so that the library asks for nothing but the C library of the machine it meets
_LINKED_IN = ("-static-libstdc++", "-static-libgcc")


class BuildWithKernels(build_py):
    """Also compile the kernels; without a compiler they are left to the machine that installs the wheel."""

    def run(self) -> None:
        """Copy the modules, then add the library."""
        super().run()
        directory = Path(self.build_lib) / "kernels" / PREBUILT.name
        directory.mkdir(parents=True, exist_ok=True)
        try:
            build(directory / library_name(), _LINKED_IN)
        except BuildError as error:
            print(f"warning: the wheel carries no compiled kernels: {error}", file=sys.stderr)


class Platform(Distribution):
    """Says that there is machine code inside."""

    def has_ext_modules(self) -> bool:
        """Return what makes setuptools choose the directory for one platform."""
        return True


class PlatformWheel(bdist_wheel):
    """A wheel for one platform and any Python: the library knows nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tag of the platform alone."""
        return "py3", "none", super().get_tag()[2]


setup(distclass=Platform, cmdclass={"build_py": BuildWithKernels, "bdist_wheel": PlatformWheel})
