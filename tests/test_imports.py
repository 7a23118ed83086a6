"""The package's imports run one way, by folder, and no two modules import each other.

Counted are all imports: those for type checkers and those inside functions too.
"""

from __future__ import annotations

import ast
from pathlib import Path

import mesa_train

PACKAGE = Path(mesa_train.__file__).parent

# A folder or file imports from its own line's folder, or from a line below. Folders of one line do not
# import each other. "" is `mesa_train/__init__.py`.
ORDER = (
    ("cli",),
    ("training",),
    ("integrations",),
    ("",),
    ("moved_modules",),
    ("api",),
    ("report",),
    ("planner", "compare"),
    ("estimate",),
    ("loading",),
    ("measure",),
    ("methods", "graphs"),
    ("engine",),
    ("ops",),
    ("stash",),
    ("policy",),
    ("codecs",),
    ("kernels", "native"),
    ("models",),
    ("utils",),
)
RANK = {folder: rank for rank, folders in enumerate(ORDER) for folder in folders}


def modules(package: Path) -> dict[str, Path]:
    """The package's modules by their dotted name below it; a folder's `__init__.py` is the folder."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name: str, path: Path, known: dict[str, Path]) -> list[tuple[str, int]]:
    """(module of the package, line) for each import of a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                base = ["mesa_train", *filter(None, name.split("."))]
                base = base[: len(base) - node.level + (path.name == "__init__.py")]
                source = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                targets.append(whole if whole.removeprefix("mesa_train.") in known else source)
        for target in targets:
            if target.partition(".")[0] == "mesa_train":
                found.append((target.partition(".")[2], node.lineno))
    return found


def graph(package: Path = PACKAGE) -> dict[str, list[tuple[str, int]]]:
    known = modules(package)
    return {name: imported(name, path, known) for name, path in known.items()}


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """The sets of modules that import each other, each sorted."""

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            for target in edges.get(todo.pop(), ()):
                if target not in seen:
                    seen.add(target)
                    todo.append(target)
        return seen

    reach = {name: reachable(name) for name in edges}
    found = {
        tuple(sorted(other for other in reach[name] if name in reach.get(other, ())))
        for name in edges
        if name in reach[name]
    }
    return [list(circle) for circle in sorted(found)]


def test_every_folder_has_its_place():
    assert {name.partition(".")[0] for name in modules(PACKAGE)} == set(RANK)


def test_imports_run_one_way():
    wrong = []
    for name, targets in graph().items():
        own = name.partition(".")[0]
        for target, line in targets:
            other = target.partition(".")[0]
            if own != other and RANK[own] >= RANK[other]:
                wrong.append(f"{name or 'mesa_train'}:{line} imports {target or 'mesa_train'}")
    assert not wrong, "\n".join(wrong)


def test_no_modules_import_each_other():
    edges = {name: {target for target, _ in targets} for name, targets in graph().items()}
    assert circles(edges) == []


def test_the_walk_sees_all_kinds_of_imports(tmp_path):
    (tmp_path / "ops").mkdir()
    (tmp_path / "__init__.py").write_text("from .ops import a\n")
    (tmp_path / "ops/__init__.py").write_text("from . import b as c\n")
    (tmp_path / "ops/a.py").write_text(
        "from typing import TYPE_CHECKING\nimport mesa_train.policy\n"
        "if TYPE_CHECKING:\n    from mesa_train.ops.b import x\n"
        "def f():\n    from ..policy import y\n    from mesa_train import policy\n"
    )
    (tmp_path / "ops/b.py").write_text("def g():\n    from .a import f\n")
    (tmp_path / "policy.py").write_text("import mesa_train\n")
    found = graph(tmp_path)
    assert found[""] == [("ops.a", 1)]
    assert found["ops"] == [("ops.b", 1)]
    assert sorted(found["ops.a"]) == [("ops.b", 4), ("policy", 2), ("policy", 6), ("policy", 7)]
    edges = {name: {target for target, _ in targets} for name, targets in found.items()}
    assert circles(edges) == [["", "ops.a", "ops.b", "policy"]]
