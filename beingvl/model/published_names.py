"""Translate a model to the published Being-VL-0.5 form, and back: one folder whose weights hold
language model and VQ-GAN.

    Being-VL folder                                   published folder
    model.safetensors…   model.*, lm_head.*           model.safetensors…   model.*, lm_head.*,
                                                          model.vqmodel.*
    vqgan/model.safetensors   encoder.*, quantize.*   (among the weights)
    config.json, vqgan/, tokenizer.json               see published_config.py

Tensors keep their bytes and dtypes in both directions. Everything is checked before anything is
written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from beingvl.artefact.files import copy_inside, to_json, write_atomically
from beingvl.artefact.manifest import (
    MANIFEST_FILE,
    Manifest,
    is_complete,
    read_manifest,
    start_folder,
    verify_small_files,
    write_manifest,
)
from beingvl.data.made_with import ANCHOR, DEFAULT, IMAGE_POSITIONS, PUBLISHED, RUNNING
from beingvl.data.variant import RAW, variant_of
from beingvl.errors import InputError
from beingvl.images.vqgan import PREPROCESSOR_FILE, VQGAN
from beingvl.model import tokenizer_files
from beingvl.model.base_model import read_json, refuse_chameleon
from beingvl.model.published_config import (
    check_ids,
    layout_of_tokens,
    to_llama_config,
    to_published_config,
    write_processor,
    write_published_tokenizer,
)
from beingvl.model.rewrite_weights import NewTensor, bytes_to_write, rewrite_weights
from beingvl.model.target_folder import VBPE_FILE, VQGAN_FOLDER, finish_target, start_target
from beingvl.model.weight_files import LICENSE_PATTERNS, WeightFolder, verify_weights
from beingvl.published_form import PUBLISHED_MODEL_TYPE, VQ_CONFIG_KEY
from beingvl.vocab import LAYOUT_FILE, VocabLayout

PREFIX = "model.vqmodel."
PUBLISHED_KIND = "published_model"
VQ_MODEL_TYPE = "chameleon_vqgan"
# Files that are the same in both forms.
_SAME_FILES = ("generation_config.json", VBPE_FILE, *LICENSE_PATTERNS)
_SMALL_BYTES = 64_000_000  # upper bound for tokenizer and configs


# ---- ours to published ----


def write_published(
    model_folder: Path | str,
    target: Path | str,
    config: Mapping[str, Any] | None = None,
    link: bool = True,
) -> Manifest:
    """Write the published form of a Being-VL model folder (a base or a stage's final/). `config` is
    the result of `published_config`, and None computes it.

    Raises InputError as `published_config` does, and for a model whose image tokens have their
    anchors' positions, because the published code numbers them differently.
    """
    model_folder, target = Path(model_folder), Path(target)
    config = dict(config or published_config(model_folder))
    manifest, layout = read_manifest(model_folder, "model"), VocabLayout.load(model_folder)
    if IMAGE_POSITIONS.of(manifest) == ANCHOR and variant_of(manifest, layout) != RAW:
        raise InputError(
            f"{model_folder} was trained with image tokens at their anchors' positions, but the "
            "published code counts positions along the sequence; train on rows of `beingvl "
            f"tokenize --image_positions {RUNNING}`"
        )
    verify_small_files(model_folder)
    vq_folder = model_folder / VQGAN_FOLDER
    vqgan = VQGAN.load(vq_folder)
    vq_config = read_json(vq_folder / "config.json", "a VQ-GAN folder")
    if vq_config["model_type"] != VQ_MODEL_TYPE:
        found = f"{vq_folder} is a {vq_config['model_type']}"
        print(f"{found}; the published class reads {VQ_MODEL_TYPE} only")
    weights, vq_weights = WeightFolder(model_folder), WeightFolder(vq_folder)
    added = {PREFIX + name: _moved(vq_weights, name) for name in vq_weights}
    start_target(
        target, PUBLISHED_KIND, bytes_to_write(weights, target, added, link) + _SMALL_BYTES
    )
    _copy(model_folder, (*_SAME_FILES, LAYOUT_FILE), target)
    vocabulary = write_published_tokenizer(model_folder, target, layout)
    image_token = next(
        token for token, number in vocabulary.items() if number == layout.image_placeholder_id
    )
    write_processor(vqgan, target, image_token)
    config |= {
        "boi_token_id": layout.boi_id,
        "eoi_token_id": layout.eoi_id,
        "image_token_id": layout.image_placeholder_id,
        VQ_CONFIG_KEY: vq_config,
        "vocabulary_map": vocabulary,
    }
    write_atomically(target / "config.json", to_json(config))
    hashes = rewrite_weights(weights, target, added, link=link)
    said = (manifest.counts, manifest.lineage, manifest.details)
    return finish_target(target, PUBLISHED_KIND, *said, hashes)


def published_config(model_folder: Path, leave_rope_scaling_out: bool = False) -> dict[str, Any]:
    """config.json of the published form, without vocabulary and VQ-GAN.

    Raises InputError for a folder that is incomplete or has no VQ-GAN inside, and for a model that
    the published class would compute differently.
    """
    read_manifest(model_folder, "model")
    if not (model_folder / VQGAN_FOLDER).is_dir():
        raise InputError(
            f"{model_folder} has no {VQGAN_FOLDER}/, which the published form holds; "
            "convert with --vqgan"
        )
    return to_published_config(model_folder, leave_rope_scaling_out)


# ---- published to ours ----


@dataclass(frozen=True)
class _Published:
    """A published folder, read and checked. `vq_config` includes its `model_type`."""

    folder: Path
    weights: WeightFolder
    vq_names: list[str]
    config: dict[str, Any]
    vq_config: dict[str, Any]
    layout: VocabLayout
    tokenizer: PreTrainedTokenizerFast
    vqgan: VQGAN


def read_published(
    folder: Path | str, target: Path | str, link: bool = True, template: str | None = None
) -> Manifest:
    """Convert a published folder, ours or not, to a Being-VL model folder.

    The layout follows from the tokenizer. `template` is the chat template of training; None takes
    the manifest's, or the published one without a manifest. Raises InputError, before anything is
    written, if the folder's parts are not from one model.
    """
    published, target = _open_published(Path(folder)), Path(target)
    folder, weights, vq_names = published.folder, published.weights, published.vq_names
    layout = published.layout
    verify_weights(weights, {weights.tensors[name].file.name for name in vq_names})
    num_bytes = sum(weights.tensors[name].num_bytes for name in vq_names) + _SMALL_BYTES
    start_target(
        target, "model", num_bytes + bytes_to_write(weights, target, {}, link, drop=vq_names)
    )
    _copy(folder, _SAME_FILES, target)
    tokenizer_files.save_tokenizer(published.tokenizer, target)
    write_atomically(target / "config.json", to_json(published.config))
    write_atomically(target / LAYOUT_FILE, to_json(layout.to_dict()))
    if not (target / "generation_config.json").is_file():
        ids = {key: published.config[key] for key in ("bos_token_id", "eos_token_id")}
        ids |= {"pad_token_id": layout.pad_id}
        write_atomically(target / "generation_config.json", to_json(ids))
    _write_vqgan(published, target / VQGAN_FOLDER)
    hashes = rewrite_weights(weights, target, {}, link=link, drop=vq_names)
    counts: dict[str, int | float] = {"text_rows": layout.num_text, "new_rows": layout.num_visual}
    lineage: dict[str, str] = {}
    details: dict[str, Any] = {}
    if is_complete(folder):
        ours = read_manifest(folder)
        counts, lineage, details = ours.counts, ours.lineage, ours.details
    elif template is None:
        template = PUBLISHED
        print(
            f"{folder} has no {MANIFEST_FILE}, so it is taken to be trained on the template "
            f"{PUBLISHED!r}; --template {DEFAULT} says otherwise"
        )
    details = details | ({"template": template} if template else {})
    lineage = {**lineage, "vocab": layout.fingerprint(), "vqgan": published.vqgan.fingerprint()}
    return finish_target(target, "model", counts, lineage, details, hashes)


def _open_published(folder: Path) -> _Published:
    verify_small_files(folder)
    weights = WeightFolder(folder)
    config = read_json(folder / "config.json", "a model folder")
    refuse_chameleon(folder, config, weights)
    vq_names = [name for name in weights if name.startswith(PREFIX)]
    vq_config = config.pop(VQ_CONFIG_KEY, None)
    if not vq_names or not isinstance(vq_config, dict):
        missing = f"weights {PREFIX}*" if not vq_names else f"key {VQ_CONFIG_KEY!r} in config.json"
        raise InputError(f"{folder} has no {missing}: it is not a published Being-VL folder")
    vq_config = {"model_type": VQ_MODEL_TYPE, **vq_config}
    vq_tensors = {name.removeprefix(PREFIX): weights[name] for name in vq_names}
    vqgan = VQGAN.build(vq_config, vq_tensors, folder / PREPROCESSOR_FILE, folder)
    tokenizer = tokenizer_files.load_tokenizer(folder)
    tokenizer_files.clear_limits(tokenizer, str(folder))
    layout = _layout_of(folder, config, tokenizer, vqgan.num_codes)
    if config.get("model_type") == PUBLISHED_MODEL_TYPE:
        config = to_llama_config(config, layout, folder / "config.json")
        _check_weights(folder, weights, config)
    return _Published(folder, weights, vq_names, config, vq_config, layout, tokenizer, vqgan)


def _layout_of(
    folder: Path, config: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast, num_vq: int
) -> VocabLayout:
    """The folder's layout file, else its tokens' layout; checked against tokenizer and config."""
    path = folder / LAYOUT_FILE
    if path.is_file():
        layout = VocabLayout.read(path)
    else:
        layout = layout_of_tokens(tokenizer, config, num_vq, folder)
    if num_vq != layout.num_vq:
        raise InputError(
            f"{folder}: its VQ-GAN has {num_vq} codes, its vocabulary {layout.num_vq}; put the "
            f"right {LAYOUT_FILE} into the folder"
        )
    tokenizer_files.check_vocabulary_map(tokenizer, folder / "config.json")
    tokenizer_files.check_token_ids(tokenizer, layout, str(folder))
    specials = {"boi_token_id": layout.boi_id, "eoi_token_id": layout.eoi_id}
    specials |= {"image_token_id": layout.image_placeholder_id}
    check_ids(config, specials, folder / "config.json")
    rows = config.get("vocab_size")
    if not isinstance(rows, int) or rows < layout.size:
        raise InputError(
            f"{folder / 'config.json'} has vocab_size {rows}, its tokenizer {layout.size} tokens; "
            "take both from one folder"
        )
    return layout


def _check_weights(folder: Path, weights: WeightFolder, config: Mapping[str, Any]) -> None:
    """Raises InputError if the language model's tensors do not match its config."""
    try:
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig.from_dict(dict(config)))
    except Exception as error:  # impossible sizes and unknown RoPE types fail anywhere in its code
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{folder / 'config.json'} is not usable ({reason})") from error
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    others = [name for name in weights if not name.startswith(PREFIX) and "inv_freq" not in name]
    for name in [*shapes, *others]:
        found = list(weights.shape(name)) if name in weights else None
        if found != (expected := shapes.get(name)):
            raise InputError(
                f"{folder}: {name!r} is {found}, config.json says {expected}; the "
                "config and the weights are not of the same model"
            )


def _write_vqgan(published: _Published, target: Path) -> None:
    """Write the VQ-GAN folder inside the model folder, finished with its own manifest."""
    weights = published.weights
    named = {name.removeprefix(PREFIX): _moved(weights, name) for name in published.vq_names}
    start_folder(target, "vqgan")
    hashes = rewrite_weights(weights, target, named, link=False, drop=list(weights))
    write_atomically(target / "config.json", to_json(published.vq_config))
    _copy(published.folder, (PREPROCESSOR_FILE,), target)
    lineage = {"vqgan": published.vqgan.fingerprint()}
    write_manifest(target, "vqgan", {}, lineage, published.vqgan.sizes(), known_hashes=hashes)


def _copy(source: Path, patterns: Iterable[str], target: Path) -> None:
    paths = [path for pattern in patterns for path in source.glob(pattern) if path.is_file()]
    copy_inside(source, target, [path.name for path in paths])


def _moved(weights: WeightFolder, name: str) -> NewTensor:
    """A tensor from a different folder, unchanged."""
    return NewTensor(weights.shape(name), weights.dtype(name), lambda: weights[name])
