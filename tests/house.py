"""Figures of the house: its size, the shape of its lines and functions. Nothing enforces them.

python -m tests.house
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "beingvl"


def files() -> list[Path]:
    paths = (path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
    return sorted(PACKAGE / path for path in paths if path.parts[0] != "scripts")


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def lazy_imports(tree: ast.AST) -> int:
    """Import statements inside functions."""
    inside = {
        id(node)
        for function in functions(tree)
        for node in ast.walk(function)
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    return len(inside)


def main() -> None:
    rooms: dict[str, list[int]] = {}
    lengths: list[tuple[int, str]] = []
    totals = {
        "characters": 0,
        "non-blank characters": 0,
        "lines": 0,
        "lazy imports": 0,
        "Namespace below commands/": 0,
    }
    longest_files: list[tuple[int, str]] = []
    for path in files():
        text, name = path.read_text(), path.relative_to(PACKAGE).as_posix()
        tree = ast.parse(text)
        characters, lines = len(text), text.count("\n")
        lazy = lazy_imports(tree)
        room = rooms.setdefault(name.split("/")[0], [0, 0, 0])
        for at, value in enumerate((characters, lines, lazy)):
            room[at] += value
        totals["characters"] += characters
        totals["non-blank characters"] += len("".join(text.split()))
        totals["lines"] += lines
        totals["lazy imports"] += lazy
        if not name.startswith("commands/"):
            totals["Namespace below commands/"] += text.count("argparse.Namespace")
        longest_files.append((lines, name))
        lengths += [
            ((node.end_lineno or 0) - node.lineno + 1, f"{name}:{node.name}")
            for node in functions(tree)
        ]
    print(f"{'room':<14} {'characters':>10} {'lines':>7} {'lazy imports':>13}")
    for room_name, (characters, lines, lazy) in rooms.items():
        print(f"{room_name:<14} {characters:>10,} {lines:>7,} {lazy:>13}")
    for name, value in totals.items():
        print(f"{name}: {value:,}")
    lengths.sort(reverse=True)
    print(
        f"functions: {len(lengths):,}, p90 {lengths[len(lengths) // 10][0]} lines; over 60 lines:"
    )
    for length, name in lengths:
        if length > 60:
            print(f"  {length:>4}  {name}")
    print("files over 600 lines:")
    for lines, name in sorted(longest_files, reverse=True):
        if lines > 600:
            print(f"  {lines:>4}  {name}")


if __name__ == "__main__":
    main()
