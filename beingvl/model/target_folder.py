"""The folder that a model is written into: never an input, never somebody's files, incomplete
until its manifest is there.

    check_target(target, inputs, overwrite)    before anything else: refuses a target that would
                                               harm
    start_target(target, kind, request, …)     from here on it is ours and incomplete; nothing
                                               of another model stays in it
    finish_target(target, kind, …)             the manifest, then the marker goes

While a folder is unfinished it holds a marker with the request (options and inputs) that is being
written, so that the same request can go on with it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from beingvl.artefact.files import to_json, write_atomically
from beingvl.artefact.manifest import (
    Manifest,
    is_complete,
    refuse_other_kind,
    start_folder,
    write_manifest,
)
from beingvl.errors import InputError
from beingvl.model.weight_files import WEIGHT_PATTERNS, check_disk_space
from beingvl.vocab import LAYOUT_FILE

VQGAN_FOLDER = "vqgan"
VBPE_FILE = "vbpe.json"
UNFINISHED_FILE = ".unfinished.tmp"  # the suffix keeps it out of the manifest
MODEL_PATTERNS = (
    *WEIGHT_PATTERNS,
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template*",
    LAYOUT_FILE,
    VQGAN_FOLDER,
    VBPE_FILE,
    "*.tmp",
)
"""Everything in a model folder that decides what the model is."""


def check_target(target: Path, inputs: Mapping[str, Path], overwrite: bool) -> None:
    """Refuse a target that lies in an input (option -> path) or holds one, and one with files
    that no step left unfinished.

    Links are followed, those of single files too. A finished target is the caller's to judge.
    """
    resolved = target.resolve()
    for option, path in inputs.items():
        if not path.exists():
            raise InputError(f"{option} {path} does not exist")
        sources = [
            path.resolve(),
            *(file.resolve() for file in path.rglob("*") if file.is_symlink()),
        ]
        if sources[0] in resolved.parents or any(
            resolved in [source, *source.parents] for source in sources
        ):
            raise InputError(
                f"--output_path {target} and {option} {path} lie in each other; inputs are "
                "never changed"
            )
    if target.exists() and not target.is_dir():
        raise InputError(f"--output_path {target} is a file, expected a folder")
    if (
        not target.is_dir()
        or overwrite
        or is_complete(target)
        or (target / UNFINISHED_FILE).is_file()
    ):
        return
    if any(not path.name.endswith(".tmp") for path in target.iterdir()):
        raise InputError(
            f"--output_path {target} exists and holds files; choose another folder or add "
            "--overwrite"
        )


def start_target(
    target: Path, kind: str, request: Mapping[str, Any], num_bytes: int, overwrite: bool = True
) -> bool:
    """Make the target ours, incomplete and free of another model's files; True when `request`
    had begun to fill it.

    Raises InputError, before anything is changed, when the disk has less than `num_bytes` free, or
    when another request was interrupted here and `overwrite` is not given, or when the target is a
    finished artefact of another kind.
    """
    if is_complete(target):
        refuse_other_kind(target, kind)
    found = {} if is_complete(target) else _unfinished_request(target)
    same = found.get("request") == json.loads(to_json(request))
    if found and not same and not overwrite:
        raise InputError(
            f"{target} holds an interrupted run with other options or inputs; start that "
            "one again, choose another folder or "
            f"add --overwrite"
        )
    resuming = bool(same and found["cleared"])
    kept = [path.stat() for path in target.glob("*.safetensors")] if resuming else []
    check_disk_space(target, num_bytes - sum(stat.st_size for stat in kept if stat.st_nlink == 1))
    marker = target / UNFINISHED_FILE
    target.mkdir(parents=True, exist_ok=True)
    # The marker comes before the first deletion, so that a run killed in between is known;
    # `cleared` says what may be kept.
    write_atomically(marker, to_json({"request": request, "cleared": resuming}))
    start_folder(target, kind)
    _remove(
        path
        for pattern in (["*.tmp"] if resuming else MODEL_PATTERNS)
        for path in target.glob(pattern)
        if path != marker
    )
    write_atomically(marker, to_json({"request": request, "cleared": True}))
    return resuming


def finish_target(
    target: Path,
    kind: str,
    counts: Mapping[str, int | float],
    lineage: Mapping[str, str],
    details: Mapping[str, Any],
    known_hashes: Mapping[str, str],
) -> Manifest:
    """Write the manifest (see `write_manifest`), then remove the marker."""
    manifest = write_manifest(target, kind, counts, lineage, details, known_hashes)
    (target / UNFINISHED_FILE).unlink(missing_ok=True)
    return manifest


def _unfinished_request(target: Path) -> dict[str, Any]:
    try:
        found = json.loads((target / UNFINISHED_FILE).read_text())
    except FileNotFoundError:
        return {}
    except ValueError:
        return {"request": None, "cleared": False}
    return {"request": None, "cleared": False, **(found if isinstance(found, dict) else {})}


def _remove(paths: Iterable[Path]) -> None:
    for path in list(paths):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
