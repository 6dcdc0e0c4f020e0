"""offload.doctor: a line for everything, a cure for what is wrong, and a status that scripts can act on."""

import json
import re
import shutil
import sys
import tomllib
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from offload import doctor
from offload.doctor import main
from offload.errors import CheckpointError
from offload.memory import FileReader

SUBJECTS = [
    "python",
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "numpy",
    "xxhash",
    "models",
    "processor",
    "cpu kernels",
]
SUBJECTS += ["memory", "gpu", "locked memory", "disk", "direct reads", "cache"]


def findings(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    status = main(["--directory", str(tmp_path), "--json"])
    return status, {finding["subject"]: finding for finding in json.loads(capsys.readouterr().out)}


@pytest.fixture(autouse=True)
def healthy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine lacks: a cache of its own, threads that fit, direct reads that work."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 0, 1 << 39))
    monkeypatch.setattr(FileReader, "read_into", lambda self, *arguments: None)
    monkeypatch.setattr("kernels.cpu_matmul.cpu_backend", lambda: "cpu-avx2")


def test_every_subject_has_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = findings(capsys, tmp_path / "not" / "made" / "yet")
    assert list(found) == SUBJECTS
    assert status == 0
    assert all(finding["cure"] is None for finding in found.values())
    assert found["cpu kernels"]["found"] == "compiled, avx2"
    assert main(["--directory", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[2:15].strip() for line in lines] == [subject[:13] for subject in SUBJECTS]


def test_the_ranges_are_those_that_the_package_asks_for() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    asked = {name: text for name, _, text in (item.partition(">=") for item in project["dependencies"])}
    for name, (least, below) in doctor._RANGES.items():
        assert asked[name] == f"{'.'.join(map(str, least))},<{'.'.join(map(str, below))}"


def test_both_ends_of_the_range_of_transformers_are_run() -> None:
    script = (Path(__file__).parent.parent / ".ci" / "compatibility").read_text()
    lowest, highest = (tuple(map(int, found.split(".")[:2])) for found in re.findall(r"transformers==([\d.]+)", script))
    least, below = doctor._RANGES["transformers"]
    assert lowest == least
    assert (highest[0], highest[1] + 1) == below


def broken(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = namedtuple("usage", "total used free")

    def refuse(*_: Any) -> None:
        raise CheckpointError("cannot be read")

    def buffered(self: FileReader, *_: Any) -> None:
        self.direct = False

    if name == "transformers":
        monkeypatch.setattr(doctor, "version", lambda package: "4.57.1" if package == name else "2.13.0")
        monkeypatch.setattr(doctor, "_RANGES", {name: doctor._RANGES[name]})
    elif name == "xxhash":
        monkeypatch.setitem(doctor._RANGES, "no-such-package", ((1,), (2,)))
    elif name == "models":
        monkeypatch.setitem(sys.modules, "transformers", None)
    elif name == "processor":
        monkeypatch.setattr("torch.get_num_threads", lambda: 4096)
    elif name == "cpu kernels":
        monkeypatch.setattr("kernels.cpu_matmul.cpu_backend", lambda: "torch")
    elif name == "disk":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 0, 1 << 20))
    elif name == "direct reads":
        monkeypatch.setattr(FileReader, "read_into", buffered)
    elif name == "not tried":
        monkeypatch.setattr(FileReader, "read_into", refuse)
    else:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))


@pytest.mark.parametrize(
    ("name", "subject", "cure"),
    [
        ("transformers", "transformers", "pip install 'transformers>=5.17,<5.25': others were never tried"),
        ("xxhash", "no-such-package", "pip install no-such-package"),
        ("models", "models", "pip install --upgrade transformers: it brings the versions that it asks for"),
        ("processor", "processor", "export OMP_NUM_THREADS="),
        ("cpu kernels", "cpu kernels", "install g++ 11 or newer"),
        ("disk", "disk", "free some space"),
        ("direct reads", "direct reads", "put checkpoints on another file system"),
        ("not tried", "direct reads", "name a --directory that can be written"),
        ("cache", "cache", "point XDG_CACHE_HOME at a directory that can be written"),
    ],
)
def test_what_is_wrong_has_its_cure(
    name: str,
    subject: str,
    cure: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken(name, monkeypatch, tmp_path)
    status, found = findings(capsys, tmp_path)
    assert status == 4
    assert found[subject]["cure"].startswith(cure)
    assert main(["--directory", str(tmp_path)]) == 4
    printed = capsys.readouterr()
    assert f"! {subject}" in printed.out
    assert printed.err == f"error: to be mended: {subject}\n"
