"""The hot path can be compiled: no class outside it derives from one inside it that does not allow that (mypyc)."""

from __future__ import annotations

import ast
from pathlib import Path

from tools.compile_hot_path import HOT, ROOT


def classes(path: Path) -> list[ast.ClassDef]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]


def test_interpreted_classes_derive_only_from_compiled_ones_that_allow_it() -> None:
    compiled = {path for pattern in HOT for path in ROOT.glob(pattern)}
    closed = {
        each.name
        for path in compiled
        for each in classes(path)
        if not any("allow_interpreted_subclasses" in ast.unparse(decorator) for decorator in each.decorator_list)
    }
    others = {path for package in ("pools", "ustack") for path in Path(ROOT, package).rglob("*.py")} - compiled
    found = [
        f"{path.relative_to(ROOT)}: {each.name}({ast.unparse(base)})"
        for path in sorted(others)
        for each in classes(path)
        for base in each.bases
        if ast.unparse(base).rpartition(".")[2] in closed
    ]
    assert found == []
