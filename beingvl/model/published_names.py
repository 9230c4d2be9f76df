"""The published Being-VL-0.5 form of a model, and back: one folder whose weights hold language
model and VQ-GAN.

    Being-VL folder                                   published folder
    model.safetensors…   model.*, lm_head.*           model.safetensors…   model.*, lm_head.*,
        model.vqmodel.*
    vqgan/model.safetensors   encoder.*, quantize.*   (among the weights)
    vqgan/config.json                                 config.json, key vq_config
    vqgan/preprocessor_config.json                    preprocessor_config.json

Tensors keep their bytes and dtypes both ways; everything else in the folder is carried along.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from beingvl.artefact.files import copy_inside, to_json, write_atomically
from beingvl.artefact.manifest import (
    MANIFEST_FILE,
    Manifest,
    is_complete,
    read_manifest,
    start_folder,
    write_manifest,
)
from beingvl.errors import InputError
from beingvl.images.vqgan import VQGAN
from beingvl.model.base_model import read_json
from beingvl.model.rewrite_weights import NewTensor, bytes_to_write, rewrite_weights
from beingvl.model.target_folder import VQGAN_FOLDER, finish_target, start_target
from beingvl.model.weight_files import WEIGHT_PATTERNS, WeightFolder
from beingvl.vocab import LAYOUT_FILE, VocabLayout

PREFIX = "model.vqmodel."
VQ_CONFIG_KEY = "vq_config"
PREPROCESSOR_FILE = "preprocessor_config.json"
PUBLISHED_KIND = "published_model"
# The vocabulary that Being-VL-0.5 was published with; folders from elsewhere carry no
# vocab_layout.json.
PUBLISHED_LAYOUT = VocabLayout(
    num_text=128_256, num_vq=8192, num_merges=8192, bos_id=128_000, eos_id=128_001
)


def is_published(folder: Path | str) -> bool:
    """True when the folder's config.json holds a VQ-GAN's, as in the published form."""
    path = Path(folder) / "config.json"
    return path.is_file() and VQ_CONFIG_KEY in read_json(path, "a model folder")


def write_published(model_folder: Path | str, target: Path | str, link: bool = True) -> Manifest:
    """Write the published form of a Being-VL model folder (a base or a stage's final/).

    Raises InputError when the folder is incomplete or has no VQ-GAN inside.
    """
    model_folder, target = Path(model_folder), Path(target)
    manifest = read_manifest(model_folder, "model")
    vq_folder = model_folder / VQGAN_FOLDER
    if not vq_folder.is_dir():
        raise InputError(
            f"{model_folder} has no {VQGAN_FOLDER}/, which the published form holds; "
            "convert with --being_vq_path"
        )
    weights, vq_weights = WeightFolder(model_folder), WeightFolder(vq_folder)
    config = read_json(model_folder / "config.json", "a model folder")
    config[VQ_CONFIG_KEY] = read_json(vq_folder / "config.json", "a VQ-GAN folder")
    added = {PREFIX + name: _moved(vq_weights, name) for name in vq_weights}
    others, preprocessing = _other_files(model_folder), [*vq_folder.glob(PREPROCESSOR_FILE)]
    num_bytes = bytes_to_write(weights, target, added, link)
    num_bytes += _num_bytes(others) + _num_bytes(preprocessing)
    start_target(target, PUBLISHED_KIND, num_bytes)
    copy_inside(model_folder, target, [path.name for path in others])
    copy_inside(vq_folder, target, [path.name for path in preprocessing])
    write_atomically(target / "config.json", to_json(config))
    hashes = rewrite_weights(weights, target, added, link=link)
    said = (manifest.counts, manifest.lineage, manifest.details)
    return finish_target(target, PUBLISHED_KIND, *said, hashes)


def read_published(folder: Path | str, target: Path | str, link: bool = True) -> Manifest:
    """Write the Being-VL model folder of a published one, ours or from elsewhere.

    The layout is that of the folder's vocab_layout.json, else the published one. Raises InputError
    for a folder without `model.vqmodel.*` weights or whose sizes contradict each other.
    """
    folder, target = Path(folder), Path(target)
    weights = WeightFolder(folder)
    vq_names = [name for name in weights if name.startswith(PREFIX)]
    config = read_json(folder / "config.json", "a model folder")
    vq_config = config.pop(VQ_CONFIG_KEY, None)
    if not vq_names or not isinstance(vq_config, dict):
        missing = f"weights {PREFIX}*" if not vq_names else f"key {VQ_CONFIG_KEY!r} in config.json"
        raise InputError(
            f"{folder} has no {missing}: it is not a published Being-VL folder; for a stock LLaMA "
            "use `beingvl convert`"
        )
    layout = _layout_of(folder, config)
    if vq_config.get("num_embeddings", layout.num_vq) != layout.num_vq:
        raise InputError(
            f"{folder}: its VQ-GAN has {vq_config['num_embeddings']} codes, its vocabulary "
            f"{layout.num_vq}; put the right {LAYOUT_FILE} into the folder"
        )

    others = _other_files(folder)
    num_bytes = sum(weights.tensors[name].num_bytes for name in vq_names) + _num_bytes(others)
    num_bytes += bytes_to_write(weights, target, {}, link, drop=vq_names)
    start_target(target, "model", num_bytes)
    names = [path.name for path in others if path.name != PREPROCESSOR_FILE]
    copy_inside(folder, target, names)
    write_atomically(target / "config.json", to_json(config))
    write_atomically(target / LAYOUT_FILE, to_json(layout.to_dict()))
    vq_config = {"model_type": "chameleon_vqgan", **vq_config}
    vqgan = _write_vqgan(folder, target / VQGAN_FOLDER, weights, vq_names, vq_config)
    hashes = rewrite_weights(weights, target, {}, link=link, drop=vq_names)
    counts: dict[str, int | float] = {"text_rows": layout.num_text, "new_rows": layout.num_visual}
    lineage: dict[str, str] = {}
    details: dict[str, Any] = {}
    if is_complete(folder):
        ours = read_manifest(folder)
        counts, lineage, details = ours.counts, ours.lineage, ours.details
    lineage = {**lineage, "vocab": layout.fingerprint(), "vqgan": vqgan.fingerprint()}
    return finish_target(target, "model", counts, lineage, details, hashes)


def _write_vqgan(
    folder: Path,
    target: Path,
    weights: WeightFolder,
    vq_names: list[str],
    vq_config: Mapping[str, Any],
) -> VQGAN:
    """The VQ-GAN folder inside the model folder, finished with its own manifest."""
    named = {name.removeprefix(PREFIX): _moved(weights, name) for name in vq_names}
    start_folder(target, "vqgan")
    hashes = rewrite_weights(weights, target, named, link=False, drop=list(weights))
    write_atomically(target / "config.json", to_json(vq_config))
    copy_inside(folder, target, [path.name for path in folder.glob(PREPROCESSOR_FILE)])
    vqgan = VQGAN.load(target)
    lineage = {"vqgan": vqgan.fingerprint()}
    write_manifest(target, "vqgan", {}, lineage, vqgan.sizes(), known_hashes=hashes)
    return vqgan


def _layout_of(folder: Path, config: Mapping[str, Any]) -> VocabLayout:
    rows = config.get("vocab_size")
    path = folder / LAYOUT_FILE
    layout = VocabLayout.read(path) if path.is_file() else PUBLISHED_LAYOUT
    if not isinstance(rows, int) or rows < layout.size:
        raise InputError(
            f"{folder / 'config.json'} has vocab_size {rows}, the layout has {layout.size} ids "
            f"({layout.to_dict()}); put the {LAYOUT_FILE} of its training into the folder"
        )
    return layout


def _other_files(source: Path) -> list[Path]:
    """Every file of the top folder that holds no weights; config and manifest are written anew."""
    own = ("config.json", MANIFEST_FILE, "*.tmp", *WEIGHT_PATTERNS)
    return [
        path
        for path in sorted(source.iterdir())
        if path.is_file() and not any(path.match(pattern) for pattern in own)
    ]


def _num_bytes(paths: list[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def _moved(weights: WeightFolder, name: str) -> NewTensor:
    """A tensor of another folder, as it is."""
    return NewTensor(weights.shape(name), weights.dtype(name), lambda: weights[name])
