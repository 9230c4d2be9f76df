"""The architecture's import rules, read from the source: who may import whom, and which library
lives where.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "beingvl"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "scripts" not in path.parts)

# A room imports from itself and from rooms before it.
LAYERS = [
    "errors",
    "version",
    "json_file",
    "published_form",
    "vocab",
    "artefact",
    "sources",
    "images",
    "vbpe",
    "stage",
    "data",
    "model",
    "train",
    "inference",
    "evaluation",
    "report",
    "launch",
    "commands",
]
# Entry points: they start a command, and nothing else imports one.
PUBLISHED_NAMES = ["convert_llama_beingvl.py", "convert_llama_to_being.py", "tokenize_dataset.py"]
ENTRY_POINTS = (
    *("__main__.py", "train/train_stage.py", "train/train_vbpe.py"),
    *(f"utils/{name}" for name in PUBLISHED_NAMES),
)

# Library -> where it may be imported.
HOMES = {
    "argparse": ("commands/",),
    "deepspeed": ("train/engine.py", "train/nvme.py"),
    "bitsandbytes": ("model/adapters.py",),
    "numba": ("vbpe/",),
    "pyarrow": ("data/", "sources/"),
    "fsspec": ("sources/places.py",),
    "simdjson": ("data/",),
    "PIL": ("images/",),
    "lmms_eval": ("evaluation/lmms_eval_model.py",),
    "sacrebleu": ("evaluation/captions.py",),
    "pycocoevalcap": (),  # 100 MB of Java: the tests hold our CIDEr-D to it
    "jinja2": ("report/",),
    "matplotlib": ("report/",),
    "gradio": ("inference/page.py",),
    "starlette": ("inference/",),
    "uvicorn": ("inference/serve.py",),
}


def imports_of(path: Path) -> Iterator[str]:
    """The modules that a file names anywhere, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "beingvl":
            yield from (f"beingvl.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way_and_libraries_stay_in_their_homes(path: Path) -> None:
    place = path.relative_to(PACKAGE).as_posix()
    room = place.split("/")[0].removesuffix(".py")
    for name in imports_of(path):
        first, _, rest = name.partition(".")
        other = rest.split(".")[0]
        homes = HOMES.get(first)
        assert homes is None or place.startswith(homes), (
            f"{place} imports {name}, which lives in {', '.join(homes)}"
        )
        if first != "beingvl" or (other == "commands" and place in ENTRY_POINTS):
            continue
        if room in LAYERS and other in LAYERS:
            assert LAYERS.index(other) <= LAYERS.index(room), f"{place} imports {name}"
        assert other != "commands" or room == "commands", f"{place} imports {name}"


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        (
            ["beingvl", "beingvl.commands.main"],
            {"torch", "numpy", "transformers", "deepspeed", "pyarrow", "numba"},
        ),
        (
            ["beingvl.launch.start_training", "beingvl.launch.preflight"],
            {"torch", "numpy", "transformers", "deepspeed", "pyarrow", "numba"},
        ),
        (["beingvl.stage.stage_config"], {"torch", "transformers", "deepspeed"}),
        (["beingvl.train.train_stage"], {"torch", "transformers", "deepspeed"}),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_importing_it_loads_nothing_heavy(modules: list[str], heavy: set[str]) -> None:
    check = f"import sys, {', '.join(modules)}; sys.exit(str({heavy} & set(sys.modules) or ''))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert not done.stderr.strip(), done.stderr


def test_evaluation_export_and_plan_work_without_deepspeed() -> None:
    modules = ["evaluation.evaluate", "train.export_hf", "launch.plan"]
    lines = [
        f"import beingvl.{module}; assert 'deepspeed' not in sys.modules, {module!r}"
        for module in modules
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(["import sys", *lines])], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_there_are_no_junk_drawers() -> None:
    names = {part.removesuffix(".py") for path in FILES for part in path.relative_to(PACKAGE).parts}
    assert not names & {"helpers", "common", "misc"}
    found = sorted(path.name for path in (PACKAGE / "utils").glob("*.py"))
    assert found == ["__init__.py", *PUBLISHED_NAMES]
