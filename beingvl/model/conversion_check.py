"""Load a converted model with unmodified transformers and compare it with its base model.

Each check returns what it saw or raises DifferenceError; the table shows all checks.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from beingvl.artefact.hashes import hash_file
from beingvl.artefact.manifest import verify_folder
from beingvl.errors import InputError
from beingvl.images.vqgan import VQGAN
from beingvl.model.base_model import BaseModel, read_json
from beingvl.model.target_folder import VBPE_FILE, VQGAN_FOLDER
from beingvl.model.tokenizer_files import (
    check_same_text_tokens,
    check_token_ids,
    find_tokenizer_file,
    load_tokenizer,
)
from beingvl.model.weight_files import WeightFolder
from beingvl.vbpe.visual_bpe import VisualBPE
from beingvl.vocab import VocabLayout

PROMPTS = (
    "What is",
    "The quick brown fox jumps over 13 lazy dogs.",
    "Überprüfung: 3 × 4 = 12",
    "def add(a, b):\n    return a + b",
)
NOT_CHECKED = "not checked: there is no VQ-GAN"
_ROWS = 4096


class DifferenceError(Exception):
    """The difference that a check found, as one clause."""


def verify_conversion(base: BaseModel, result: Path, vq_path: Path | None) -> bool:
    """Print the table of checks; True if nothing differs."""
    layout = VocabLayout.load(result)
    started = time.perf_counter()
    tokenizer = load_tokenizer(result)
    load_seconds = time.perf_counter() - started
    checks: list[tuple[str, Callable[[], str]]] = [
        ("files as in the manifest", lambda: f"{len(verify_folder(result).files)} files re-hashed"),
        ("tensors beside the rows", lambda: _check_tensors(base, result)),
        ("rows of text ids", lambda: _check_text_rows(base, result)),
        ("new rows", lambda: _check_new_rows(base, result, layout)),
        ("tokenizer", lambda: _check_tokenizer(base, tokenizer, layout, load_seconds)),
        ("text logits", lambda: _check_logits(base, result, tokenizer)),
        ("generation config", lambda: _check_generation_config(result, layout)),
        ("image codes", lambda: _check_images(result, vq_path)),
    ]
    print(f"\n{'check':<26} {'result':<10} seen")
    passed = True
    for name, check in checks:
        try:
            outcome, seen = "equal", check()
            outcome = "-" if seen == NOT_CHECKED else outcome
        except (DifferenceError, InputError) as difference:
            outcome, seen, passed = "DIFFERENT", str(difference), False
        print(f"{name:<26} {outcome:<10} {seen}", flush=True)
    print(f"{result}: {'everything as in' if passed else 'DIFFERS from'} {base.folder}")
    return passed


def _check_tensors(base: BaseModel, result: Path) -> str:
    """Compare all tensors that conversion does not change (cast if dtypes differ)."""
    weights = WeightFolder(result)
    grown = {base.input_name, base.output_name, base.output_bias_name}
    expected, found = {*base.weights, base.output_name}, set(weights)
    if expected != found:
        raise DifferenceError(f"names: {sorted(expected ^ found)[:3]} are in one only")
    for name in expected - grown:
        ours, theirs = weights[name], base.weights[name]
        if ours.shape != theirs.shape or not torch.equal(ours, theirs.to(ours.dtype)):
            raise DifferenceError(f"{name} is not the base model's")
    shared = 0
    for name, names in weights.files.items():
        source = base.folder / name
        if source.is_file() and source.samefile(result / name):
            shared += len(set(names) - grown)
    linked = f", {shared} of them in files linked to the base's" if shared else ""
    return f"{len(expected - grown)} tensors{linked}"


def _check_text_rows(base: BaseModel, result: Path) -> str:
    weights = WeightFolder(result)
    names = [(base.input_name, base.input_name), (base.output_name, base.stored_output_name)]
    for name, stored in names:
        for start in range(0, base.num_text, _ROWS):
            stop = min(start + _ROWS, base.num_text)
            ours = weights[name][start:stop]
            if not torch.equal(ours, base.weights[stored][start:stop].to(ours.dtype)):
                raise DifferenceError(f"{name} differs between rows {start} and {stop}")
    return f"2 x {base.num_text} rows"


def _check_new_rows(base: BaseModel, result: Path, layout: VocabLayout) -> str:
    weights = WeightFolder(result)
    spreads = []
    for name in (base.input_name, base.output_name):
        if weights.shape(name)[0] < layout.size:
            raise DifferenceError(
                f"{name} has {weights.shape(name)[0]} rows, the layout has {layout.size} ids"
            )
        rows = weights[name][layout.num_text : layout.size]
        if not all(torch.isfinite(block).all() for block in rows.split(_ROWS)):
            raise DifferenceError(f"{name} has new rows that are not finite")
        spreads.append(float(rows[:_ROWS].float().std()))
    return f"2 x {layout.num_visual} rows, finite, std {spreads[0]:.4g} and {spreads[1]:.4g}"


def _check_tokenizer(
    base: BaseModel, tokenizer: PreTrainedTokenizerFast, layout: VocabLayout, load_seconds: float
) -> str:
    check_token_ids(tokenizer, layout, "tokenizer.json")
    if find_tokenizer_file(base.folder):
        own = load_tokenizer(base.folder)
        check_same_text_tokens(tokenizer, own, "tokenizer.json")
        for prompt in PROMPTS:
            if tokenizer(prompt)["input_ids"] != own(prompt)["input_ids"]:
                raise DifferenceError(f"{prompt!r} is encoded differently by {base.folder}")
    return f"{len(tokenizer)} tokens, loaded in {load_seconds:.1f} s"


def _check_logits(base: BaseModel, result: Path, tokenizer: PreTrainedTokenizerFast) -> str:
    """Compare the logits of all text ids on fixed prompts, one model after the other."""
    prompts = [torch.tensor([tokenizer(prompt)["input_ids"]]) for prompt in PROMPTS]
    ours, dtype = _text_logits(result, prompts, base.num_text, None)
    theirs, _ = _text_logits(base.folder, prompts, base.num_text, dtype)
    if not all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)):
        difference = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
        raise DifferenceError(f"the largest difference is {difference:.3g}")
    name = str(dtype).removeprefix("torch.")
    return f"{len(prompts)} prompts x {base.num_text} ids, {name}, bit-identical"


@torch.inference_mode()
def _text_logits(
    folder: Path, prompts: list[torch.Tensor], num_text: int, dtype: torch.dtype | None
) -> tuple[list[torch.Tensor], torch.dtype]:
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype or "auto", trust_remote_code=False
    )
    cut_head(model, num_text)
    logits = [model(input_ids=prompt, use_cache=False).logits[0].float() for prompt in prompts]
    dtype = model.dtype
    del model
    gc.collect()
    return logits, dtype


def cut_head(model: Any, num_rows: int) -> None:
    """Keep only the head's first rows: a product of a different width may round differently."""
    head = model.get_output_embeddings()
    for name, parameter in list(head.named_parameters()):
        setattr(head, name, torch.nn.Parameter(parameter[:num_rows].clone(), requires_grad=False))


def _check_generation_config(result: Path, layout: VocabLayout) -> str:
    config = read_json(result / "generation_config.json", "a model folder")
    eos = config.get("eos_token_id")
    if layout.eos_id not in (eos if isinstance(eos, list) else [eos]):
        raise DifferenceError(f"eos_token_id is {eos}, the layout says {layout.eos_id}")
    return f"stops at {eos}, pads with {config.get('pad_token_id')}"


def _check_images(result: Path, vq_path: Path | None) -> str:
    """Send a test picture through both VQ-GANs (or the one inside) and vBPE, and back."""
    if not (result / VQGAN_FOLDER).is_dir() and vq_path is None:
        return NOT_CHECKED
    ours = VQGAN.load(result / VQGAN_FOLDER)
    for path in vq_path.rglob("*") if vq_path else []:
        copy = result / VQGAN_FOLDER / path.relative_to(vq_path or result)
        if path.is_file() and not (copy.is_file() and hash_file(copy) == hash_file(path)):
            raise DifferenceError(f"{copy} is not {path}")
    theirs = VQGAN.load(vq_path) if vq_path else ours
    side = ours.image_size
    ramp = torch.linspace(-1, 1, side)
    rows, waves = ramp.expand(side, side), torch.sin(9 * ramp[:, None] * ramp)
    picture = torch.stack([rows, rows.T, waves])[None]
    codes = ours.encode(picture)
    if not np.array_equal(codes, theirs.encode(picture)):
        raise DifferenceError(f"{result / VQGAN_FOLDER} and {theirs.source} give different codes")
    seen = f"{codes.shape[1]} x {codes.shape[2]} codes, {len(np.unique(codes))} different"
    if (result / VBPE_FILE).is_file():
        vbpe = VisualBPE.load(result)
        ids = vbpe.encode(codes[0])
        is_lossless = vbpe.kind != "legacy"  # published vocabularies encode only
        if is_lossless and not np.array_equal(vbpe.decode(ids, *codes.shape[1:]), codes[0]):
            raise DifferenceError("vBPE does not give the codes back")
        seen += f", {len(ids)} vBPE tokens{' and back' if is_lossless else ''}"
    if ours.has_decoder:
        return f"{seen}, decoded to {ours.decode(codes).shape[1:]}"
    return f"{seen}, no decoder to try"
