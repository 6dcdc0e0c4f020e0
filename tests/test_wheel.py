"""The wheel carries the compiled kernels, which need no compiler where it is installed."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_a_wheel_multiplies_without_a_compiler(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for room in ("kernels", "offload", "quant", "eval"):
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__", "prebuilt"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", str(tmp_path)]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.split("-")[2:4] == ["py3", "none"]
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(installed)
    assert [name for name in names if name.startswith("kernels/prebuilt/") and name.endswith(".so")]
    assert "kernels/cpu/rows.h" in names
    assert not [name for name in names if name.startswith("tests/")]
    program = "import kernels.cpu_matmul as k; print(k.__file__, k.cpu_backend())"
    environment = os.environ | {
        "PYTHONPATH": str(installed),
        "CXX": "none",
        "PATH": "",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    file, backend = ran.stdout.split()
    assert Path(file).is_relative_to(installed)
    assert backend.startswith("cpu-")
    assert not (tmp_path / "cache").exists()
