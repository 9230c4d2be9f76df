"""The folder that a model is written into: never an input, never a folder with a user's files, and
incomplete until it has a manifest.

    check_target(target, inputs)               first of all: refuses harmful targets
    start_target(target, kind, num_bytes)      from here on it is ours, empty and incomplete
    finish_target(target, kind, …)             writes the manifest, then removes the marker

An unfinished folder contains a marker, by which the next run recognises it as its own. A killed
conversion starts over: 16 GB take half a minute.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from beingvl.artefact.card import write_card
from beingvl.artefact.files import to_json, write_atomically
from beingvl.artefact.manifest import (
    Manifest,
    is_complete,
    refuse_other_kind,
    write_manifest,
)
from beingvl.artefact.owner import OWNER, UNFINISHED_FILE, refuse_files_of_others, start_alone
from beingvl.data.chat_template import BASE_TEMPLATES, CHAT_TEMPLATE_FILE, chat_template
from beingvl.data.made_with import DEFAULT
from beingvl.errors import InputError
from beingvl.model.card import model_card
from beingvl.model.rewrite_weights import check_disk_space
from beingvl.model.weight_files import LICENSE_PATTERNS, WEIGHT_PATTERNS
from beingvl.vocab import LAYOUT_FILE, VocabLayout

VQGAN_FOLDER = "vqgan"
VBPE_FILE = "vbpe.json"
PROCESSOR_FILE = "processor_config.json"
PROCESSOR = "BeingVLProcessor"  # in inference/processor.py; AutoProcessor looks for this name
MODEL_PATTERNS = (
    *WEIGHT_PATTERNS,
    "config.json",
    "adapter_config.json",
    "generation_config.json",
    "preprocessor_config.json",
    PROCESSOR_FILE,
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template*",
    BASE_TEMPLATES,
    LAYOUT_FILE,
    VQGAN_FOLDER,
    VBPE_FILE,
    "*.tmp",
)
"""Everything in a model folder that determines the model."""


def check_target(target: Path, inputs: Mapping[str, Path]) -> None:
    """Raises InputError if the target is inside an input (option -> path) or contains one, or if it
    contains files that are not from an unfinished run.

    Links are followed, including those of single files. Finished targets are left to the caller.
    """
    resolved = target.resolve()
    for option, path in inputs.items():
        if not path.exists():
            raise InputError(f"{option} {path} does not exist")
        links = [file.resolve() for file in path.rglob("*") if file.is_symlink()]
        sources = [path.resolve(), *links]
        holds_one = any(resolved in [source, *source.parents] for source in sources)
        if holds_one or sources[0] in resolved.parents:
            raise InputError(
                f"--output {target} and {option} {path} are inside each other; choose another "
                "folder to write in"
            )
    if target.exists() and not target.is_dir():
        raise InputError(f"--output {target} is a file, expected a folder")
    refuse_files_of_others(target)


def start_target(target: Path, kind: str, num_bytes: int) -> None:
    """Make the target ours, incomplete and free of a previous model's files.

    Raises InputError, before anything is changed, if the disk has less than `num_bytes` free, or if
    the target is a finished artefact of a different kind.
    """
    if is_complete(target):
        refuse_other_kind(target, kind)  # before the disk's space, which would be the wrong cause
    check_disk_space(target, num_bytes)
    start_alone(target, kind)
    kept = (target / UNFINISHED_FILE, target / OWNER)
    for path in [path for pattern in MODEL_PATTERNS for path in target.glob(pattern)]:
        if path in kept:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def finish_target(
    target: Path,
    kind: str,
    counts: Mapping[str, int | float],
    lineage: Mapping[str, str],
    details: Mapping[str, Any],
    known_hashes: Mapping[str, str],
) -> Manifest:
    """Write a model's chat template, the manifest (see `write_manifest`) and the card, then remove
    the marker. A user's files in this folder are never listed, so never removed.
    """
    if kind == "model":
        write_atomically(target / PROCESSOR_FILE, to_json({"processor_class": PROCESSOR}))
        _write_chat_template(target, details.get("template", DEFAULT))
    manifest = write_manifest(target, kind, counts, lineage, details, known_hashes, _is_of_a_model)
    if kind == "model":
        write_card(target, model_card(target, manifest))
    (target / UNFINISHED_FILE).unlink(missing_ok=True)
    return manifest


def _is_of_a_model(name: str) -> bool:
    first = name.partition("/")[0]
    return any(fnmatch(first, pattern) for pattern in (*MODEL_PATTERNS, *LICENSE_PATTERNS))


def _write_chat_template(target: Path, template: str) -> None:
    path = target / CHAT_TEMPLATE_FILE
    if text := chat_template(target, VocabLayout.load(target), template):
        write_atomically(path, text)
        return
    path.unlink(missing_ok=True)  # the previous stage's
    print(f"{target}: its tokenizer has no exact chat template, so none is written")
