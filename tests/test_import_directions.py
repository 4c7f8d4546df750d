"""Imports point one way: reproduce_tables -> tables -> steps -> PRC_SAM, report -> models, tools."""

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

MAY_IMPORT = {  # folder, or "steps" for the scripts in the top folder -> of the project's own code
    "models": {"models"},
    "tools": {"tools", "models"},
    "PRC_SAM": {"PRC_SAM", "models", "tools"},
    "report": {"report", "models", "tools"},
    "datasetsprocess": {"datasetsprocess", "models", "tools"},
    "steps": {"steps", "PRC_SAM", "report", "models", "tools"},
    "tables": {"tables", "steps", "PRC_SAM", "report", "models", "tools"},
    "reproduce_tables": {"tables", "steps", "PRC_SAM", "report", "models", "tools"},
}
SCRIPTS = {path.stem: "steps" for path in ROOT.glob("*.py")} | {"reproduce_tables": "reproduce_tables"}
PARTS = SCRIPTS | {folder: folder for folder in MAY_IMPORT if (ROOT / folder).is_dir()}


def imported(path: Path) -> set[str]:
    """The first part of every name that a file imports, at its top or within a function."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "." for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_point_one_way(part):
    files = [ROOT / f"{name}.py" for name, of in SCRIPTS.items() if of == part] or sorted((ROOT / part).rglob("*.py"))
    assert files
    for path in files:
        ours = {PARTS[name] for name in imported(path) if name in PARTS}
        assert ours <= MAY_IMPORT[part], f"{path.relative_to(ROOT)} imports {', '.join(ours - MAY_IMPORT[part])}"
