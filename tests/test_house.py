"""The rooms and who may enter whom: no arrow points up, and no circle can stand."""

import ast
import importlib
from collections.abc import Mapping, Set
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "kernels": {"kernels"},
    "offload": {"kernels", "offload"},
    "quant": {"kernels", "offload", "quant"},
    "eval": {"kernels", "offload", "eval"},
}
FILES = [path for room in MAY_IMPORT for path in sorted((ROOT / room).rglob("*.py"))]


def imported_packages(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_import_points_up(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    forbidden = (set(MAY_IMPORT) | {"tests"}) - MAY_IMPORT[room]
    assert not imported_packages(path) & forbidden


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_files(tree: ast.Module, known: Set[str]) -> set[str]:
    """Return those of the modules in `known` that a file imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= inside if inside <= known else inside | {node.module or ""}
    return names & known


def circle(imports: Mapping[str, set[str]]) -> list[str]:
    """Return modules of which each imports the next and the last the first, [] if there are none."""
    left = dict(imports)
    while free := [name for name, found in left.items() if not found & left.keys()]:
        for name in free:
            del left[name]
    way: list[str] = []
    at = min(left, default="")
    while at and at not in way:
        way.append(at)
        at = min(left[at] & left.keys())
    return way[way.index(at) :] if at else []


@pytest.mark.parametrize("room", [*MAY_IMPORT, "tests"])
def test_files_of_a_room_import_each_other_in_no_circle(room: str) -> None:
    trees = {module_name(path): ast.parse(path.read_text()) for path in (ROOT / room).rglob("*.py")}
    found = circle({name: imported_files(tree, trees.keys()) - {name} for name, tree in trees.items()})
    assert not found, (
        f"a circle of imports: {' -> '.join([*found, found[0]])}; let what two of them need be a third file"
    )


def test_a_circle_of_imports_is_found_wherever_it_is_closed() -> None:
    sources = {
        "room": "from room.first import work",
        "room.first": "import room.second",
        "room.second": "def work():\n    from room.deep import third",
        "room.deep": "",
        "room.deep.third": "from room.first import work",
        "room.apart": "import os, room.first",
    }
    imports = {name: imported_files(ast.parse(source), sources.keys()) for name, source in sources.items()}
    assert circle(imports) == ["room.first", "room.second", "room.deep.third"]
    imports["room.second"] = set()
    assert circle(imports) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_transformers_stays_out_of_the_kernels_and_triton_in_them(path: Path) -> None:
    found = imported_packages(path)
    room = path.relative_to(ROOT).parts[0]
    if room == "kernels":
        assert not found & {"transformers", "safetensors", "accelerate"}
    else:
        assert "triton" not in found


def test_a_file_is_one_subject() -> None:
    long = {path.name: lines for path in FILES if (lines := len(path.read_text().splitlines())) > 350}
    assert not long


def test_every_docstring_of_a_public_name_is_there() -> None:
    bare = []
    for path in FILES:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            kinds = (ast.FunctionDef, ast.ClassDef)
            if isinstance(node, kinds) and not node.name.startswith("_") and not ast.get_docstring(node):
                inside_a_function = any(
                    isinstance(outer, ast.FunctionDef) and node in ast.walk(outer) and outer is not node
                    for outer in ast.walk(tree)
                )
                if not inside_a_function:
                    bare.append(f"{path.name}:{node.name}")
    assert not bare


@pytest.mark.parametrize(
    "command",
    [
        "quant.awq",
        "quant.rtn",
        "quant.gptq",
        "offload.chat",
        "offload.doctor",
        "offload.generate",
        "offload.plan",
        "offload.serve",
        "offload.verify",
        "eval.harness",
        "eval.ppl",
        "eval.compare",
        "eval.quality",
        "eval.report",
        "eval.speed",
        "eval.timeline",
    ],
)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a process for each, which would take seconds to import torch."""
    package = (ROOT / command.replace(".", "/")).is_dir()
    module = importlib.import_module(f"{command}.__main__" if package else command)
    assert (Path(str(module.__file__)).read_text()).endswith('if __name__ == "__main__":\n    sys.exit(main())\n')
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: python -m {command}" in shown
    assert "(default:" in shown
