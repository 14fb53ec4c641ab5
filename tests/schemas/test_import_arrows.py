"""Imports run along the arrows of the design and never back; nothing imports what it does not hold."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import schemas

HOME = Path(schemas.__file__).resolve().parent.parent
ROOMS = ("schemas", "selection_ops", "pipelines", "trainer", "lehr")
MAY_IMPORT = {
    "schemas": {"schemas"},
    "selection_ops": {"schemas", "selection_ops"},
    "pipelines": {"schemas", "selection_ops", "pipelines"},
    "trainer": {"schemas", "selection_ops", "trainer"},
    "lehr": set(ROOMS),
}
NEVER = {
    "schemas": {"torch", "transformers", "apache_beam", "numpy"},
    "selection_ops": {"apache_beam"},
    "trainer": {"apache_beam"},
    "pipelines": set(),
    "lehr": set(),
}
FILES = sorted(path for room in ROOMS for path in (HOME / room).rglob("*.py"))


def imports(source: str) -> set[str]:
    """Top-level packages that a module imports anywhere, also inside functions and for type checking."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the room they come from"
            found.add(str(node.module).split(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant):
                found.add(str(first.value).split(".")[0])
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(HOME)))
def test_imports_follow_the_arrows(path: Path) -> None:
    room = path.relative_to(HOME).parts[0]
    found = imports(path.read_text(encoding="utf-8"))
    back = (found & set(ROOMS)) - MAY_IMPORT[room]
    assert not back, f"{path} imports {sorted(back)} against the arrows"
    assert not found & NEVER[room], f"{path} imports {sorted(found & NEVER[room])}, which {room} never holds"
    assert "tests" not in found and "benchmarks" not in found


def test_the_walk_sees_every_kind_of_import() -> None:
    source = "import a.b\nfrom c.d import e\ndef f():\n    import g\n    importlib.import_module('h.i')\nif TYPE_CHECKING:\n    import j"
    assert imports(source) == {"a", "c", "g", "h", "j"}


def test_every_room_has_files() -> None:
    assert {path.relative_to(HOME).parts[0] for path in FILES} == set(ROOMS)
