"""The architecture's import rules, read from the source: who may import whom, and which library
lives where.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "beingvl"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "scripts" not in path.parts)

# A layer imports from itself and from layers before it.
LAYERS = [
    "errors",
    "vocab",
    "manifest",
    "parts",
    "tokenizer",
    "data",
    "model",
    "train",
    "export",
    "inference",
]
FREE = {
    "cli",
    "__main__",
    "__init__",
    "verify",
    "utils",
    "launch",
}  # the command table and entry points stand outside
NOT_EACH_OTHER = {("export", "inference"), ("inference", "export")}

# Library -> where it may be imported.
HOMES = {
    "deepspeed": ("train/engine.py",),
    "numba": ("vbpe/kernels.py", "data/token_rows_numba.py"),
    "pyarrow": ("data/",),
    "simdjson": ("data/",),
    "PIL": ("tokenizer/",),
    "lmms_eval": ("evaluation/lmms_eval_model.py",),
    "pycocoevalcap": ("evaluation/metrics_qa.py",),
    "sacrebleu": ("evaluation/metrics_qa.py",),
}


def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def layer_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    layer = layer_of(path)
    if layer in FREE:
        return
    for name in imports_of(path):
        if name.startswith("beingvl.") and (other := name.split(".")[1]) in LAYERS:
            assert LAYERS.index(other) <= LAYERS.index(layer), f"{path} imports {name}"
            assert (layer, other) not in NOT_EACH_OTHER, f"{path} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_libraries_stay_in_their_homes(path: Path) -> None:
    place = path.relative_to(PACKAGE).as_posix()
    for name in imports_of(path):
        homes = HOMES.get(name.split(".")[0])
        assert homes is None or place.startswith(homes), (
            f"{place} imports {name}, which lives in {homes}"
        )


def test_importing_the_package_does_nothing_heavy() -> None:
    code = (
        "import sys, beingvl, beingvl.commands.main; assert not {'torch', 'numpy', "
        "'transformers'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_there_are_no_junk_drawers() -> None:
    names = {part.removesuffix(".py") for path in FILES for part in path.relative_to(PACKAGE).parts}
    assert not names & {"helpers", "common", "misc"}
    assert sorted(path.name for path in (PACKAGE / "utils").glob("*.py")) in (
        ["__init__.py", "convert_llama_to_being.py"],
        ["convert_llama_to_being.py"],
    )
