"""[5] Any LLaMA + vocabulary -> Being-VL base/: longer embedding and head, longer tokenizer, the
VQ-GAN inside.

    beingvl convert --llama_path llama/ --being_vq_path vq/ --vbpe vbpe.json --output_path base/
    --verify_loading

The checkpoint is never loaded as a model. Weight files without embedding or head are hard-linked
(or copied), the others are rewritten tensor by tensor. Rows of the text ids keep their bytes; new
rows start by --init. Tied embeddings are untied. The result is a stock Hugging Face folder:
unmodified transformers loads it, and its text logits are the base model's. An interrupted run is
finished by running the same command again.
"""

from __future__ import annotations

import argparse
import gc
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from beingvl.artefact.files import to_json, write_atomically
from beingvl.artefact.hashes import hash_inputs
from beingvl.artefact.manifest import already_made, join_lineages
from beingvl.errors import InputError
from beingvl.images.vqgan import VQGAN
from beingvl.model import tokenizer_files
from beingvl.model.base_model import LICENSE_PATTERNS, BaseModel, read_json, small_files
from beingvl.model.conversion_check import verify_conversion
from beingvl.model.new_rows import VisualVocabulary, check_visual_vocabulary, make_rows
from beingvl.model.target_folder import (
    VBPE_FILE,
    VQGAN_FOLDER,
    check_target,
    finish_target,
    start_target,
)
from beingvl.model.tokenizer_files import (
    check_belongs_to,
    find_tokenizer_file,
    load_tokenizer,
    save_tokenizer,
)
from beingvl.model.weight_files import NewTensor, bytes_to_write, rewrite_weights
from beingvl.vbpe.visual_bpe import AnyVBPE, VisualBPE
from beingvl.vocab import LAYOUT_FILE, VocabLayout

INIT_METHODS = ("he", "mean", "mean_cov", "codebook", "zero")
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEFAULT_CODES = DEFAULT_MERGES = 8192


@dataclass(frozen=True)
class Conversion:
    """Everything a conversion reads, checked against each other; nothing is written yet."""

    base: BaseModel
    layout: VocabLayout
    tokenizer: PreTrainedTokenizerFast
    vqgan: VQGAN | None
    vbpe: AnyVBPE | None
    num_rows: int
    dtype: torch.dtype | None

    @property
    def lineage(self) -> dict[str, str]:
        lineage = {"vocab": self.layout.fingerprint()}
        if self.vqgan:
            lineage["vqgan"] = self.vqgan.fingerprint()
        if self.vbpe:
            lineage["vbpe"] = self.vbpe.fingerprint()
        return lineage


@contextmanager
def _collecting_rarely() -> Iterator[None]:
    """A fifth of the start: transformers and the tokenizer are a million objects, none garbage."""
    before = gc.get_threshold()
    gc.set_threshold(100_000, 50, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


@_collecting_rarely()
def run(args: argparse.Namespace) -> int:
    check_arguments(args)
    conversion = plan_conversion(args)
    request = make_request(args, conversion)
    if not already_made(args.output_path, "model", request, args.overwrite):
        write_base(args, conversion, request)
    if not args.verify_loading:
        return 0
    return 0 if verify_conversion(conversion.base, args.output_path, args.being_vq_path) else 1


# ---- reading and checking ----


def check_arguments(args: argparse.Namespace) -> None:
    """Raises InputError for a target that would harm (see `check_target`) and for numbers out of
    range.
    """
    options = ("llama_path", "being_tokenizer_config_path", "being_vq_path", "vbpe")
    check_target(
        args.output_path,
        {f"--{key}": path for key in options if (path := getattr(args, key))},
        args.overwrite,
    )
    if args.pad_vocab_multiple < 1:
        raise InputError(f"--pad_vocab_multiple is {args.pad_vocab_multiple}, expected 1 or more")
    if args.seed < 0:
        raise InputError(f"--seed is {args.seed}, expected 0 or more")


def plan_conversion(args: argparse.Namespace) -> Conversion:
    """Read headers, tokenizer, VQ-GAN and vBPE; raises InputError for whatever does not fit
    together.
    """
    base = BaseModel.open(args.llama_path)
    vqgan = _load_vqgan(args.being_vq_path)
    vbpe = VisualBPE.load(args.vbpe) if args.vbpe else None
    if args.vocab_size not in (None, base.num_text):
        raise InputError(
            f"--vocab_size is {args.vocab_size}, but {args.llama_path} has {base.num_text} text ids"
        )
    _check_vbpe_belongs_to(vbpe, vqgan, args)
    tokenizer = _base_tokenizer(args, base)
    layout = _make_layout(args, base, tokenizer, vqgan, vbpe)
    tokenizer = _make_tokenizer(args, base, tokenizer, layout)
    if args.init == "codebook":
        check_visual_vocabulary(_visual_vocabulary(vqgan, vbpe), layout)
    num_rows = -(-layout.size // args.pad_vocab_multiple) * args.pad_vocab_multiple
    dtype = None if args.torch_dtype == "auto" else getattr(torch, args.torch_dtype)
    return Conversion(base, layout, tokenizer, vqgan, vbpe, num_rows, dtype)


def _load_vqgan(folder: Path | None) -> VQGAN | None:
    if folder is None:
        return None
    return VQGAN.load(folder)


def _check_vbpe_belongs_to(
    vbpe: AnyVBPE | None, vqgan: VQGAN | None, args: argparse.Namespace
) -> None:
    if vbpe is None or vqgan is None:
        return
    join_lineages(
        {str(args.being_vq_path): {"vqgan": vqgan.fingerprint()}, str(args.vbpe): vbpe.lineage}
    )
    if vbpe.num_codes != vqgan.num_codes:
        raise InputError(
            f"{args.vbpe} is for {vbpe.num_codes} codes, {args.being_vq_path} has "
            f"{vqgan.num_codes}; train the vBPE on its codes"
        )


def _base_tokenizer(args: argparse.Namespace, base: BaseModel) -> PreTrainedTokenizerFast | None:
    """The base model's own tokenizer; None when there is none and --being_tokenizer_config_path
    takes its place.
    """
    if args.being_tokenizer_config_path and find_tokenizer_file(args.llama_path) is None:
        return None
    tokenizer = load_tokenizer(args.llama_path, base.num_text)
    check_belongs_to(tokenizer, base)
    return tokenizer


def _make_layout(
    args: argparse.Namespace,
    base: BaseModel,
    tokenizer: PreTrainedTokenizerFast | None,
    vqgan: VQGAN | None,
    vbpe: AnyVBPE | None,
) -> VocabLayout:
    num_vq = vqgan.num_codes if vqgan else vbpe.num_codes if vbpe else DEFAULT_CODES
    bos_id = base.special_id("bos_token_id", tokenizer.bos_token_id if tokenizer else None)
    eos_id = base.special_id("eos_token_id", tokenizer.eos_token_id if tokenizer else None)
    if eos_id is None:
        raise InputError(
            f"{args.llama_path / 'config.json'} has no eos_token_id and its tokenizer "
            "names none; add it"
        )
    layout = VocabLayout(base.num_text, num_vq, 0, eos_id if bos_id is None else bos_id, eos_id)

    wanted = {f"{args.vbpe}": vbpe.num_merges} if vbpe else {}
    if args.num_merges is not None:
        wanted["--num_merges"] = args.num_merges
    if args.extended_vocab_size is not None:
        if args.extended_vocab_size < layout.size:
            raise InputError(
                f"--extended_vocab_size is {args.extended_vocab_size}, but {base.num_text} "
                f"text ids, 5 specials and {num_vq} "
                f"codes already make {layout.size}"
            )
        wanted["--extended_vocab_size"] = args.extended_vocab_size - layout.size
    if len(set(wanted.values())) > 1:
        found = ", ".join(f"{source} means {count}" for source, count in wanted.items())
        raise InputError(f"the number of merges is contradictory: {found}; give one of them")
    num_merges = next(iter(wanted.values()), DEFAULT_MERGES)
    return VocabLayout(base.num_text, num_vq, num_merges, layout.bos_id, layout.eos_id)


def _make_tokenizer(
    args: argparse.Namespace,
    base: BaseModel,
    own: PreTrainedTokenizerFast | None,
    layout: VocabLayout,
) -> PreTrainedTokenizerFast:
    """The given tokenizer, checked, or the base model's with the new tokens."""
    given_path = args.being_tokenizer_config_path
    if given_path is None:
        assert own is not None
        tokenizer_files.extend_tokenizer(own, layout, str(args.llama_path))
        tokenizer_files.check_token_ids(own, layout, str(args.llama_path))
        return own
    folder = given_path if given_path.is_dir() else given_path.parent
    _check_tokenizer_folder(folder, base, layout)
    tokenizer = tokenizer_files.load_tokenizer(folder)
    tokenizer_files.add_missing_merges(tokenizer, layout)
    tokenizer_files.check_token_ids(tokenizer, layout, str(given_path))
    if own is not None:
        tokenizer_files.check_same_text_tokens(tokenizer, own, str(given_path))
    return tokenizer


def _check_tokenizer_folder(folder: Path, base: BaseModel, layout: VocabLayout) -> None:
    """A tokenizer folder may carry the config and the layout it was made for; they must be this
    model's.
    """
    config = read_json(folder / "config.json", "") if (folder / "config.json").is_file() else {}
    if config.get("hidden_size") not in (None, base.hidden_size):
        raise InputError(
            f"{folder / 'config.json'} has hidden_size {config['hidden_size']}, "
            f"{base.folder} has {base.hidden_size}: "
            f"the tokenizer belongs to another model; give the right one, or none"
        )
    if (folder / LAYOUT_FILE).is_file() and VocabLayout.load(folder) != layout:
        raise InputError(
            f"{folder / LAYOUT_FILE} is {VocabLayout.load(folder).to_dict()}, this "
            f"conversion makes {layout.to_dict()}; "
            f"give the tokenizer made for this vocabulary, or none"
        )


def _visual_vocabulary(vqgan: VQGAN | None, vbpe: AnyVBPE | None) -> VisualVocabulary | None:
    return (
        None
        if vqgan is None
        else VisualVocabulary(vqgan.codebook, _codes_of_merges(vbpe) if vbpe else [])
    )


def _codes_of_merges(vbpe: AnyVBPE) -> list[np.ndarray]:
    """The codes that each merge covers, one entry a cell; a legacy token has no fixed shape, but
    its codes are known too.
    """
    codes = [np.array([code]) for code in range(vbpe.num_codes)]
    for a, b, *_ in vbpe.merges.tolist():
        codes.append(np.concatenate([codes[a], codes[b]]))
    return codes[vbpe.num_codes :]


def make_request(args: argparse.Namespace, conversion: Conversion) -> dict[str, Any]:
    """What decides the result: a folder made by an equal request needs not be made again, or can
    be finished.
    """
    given, vq_path = args.being_tokenizer_config_path, args.being_vq_path
    tokenizer_folder = given if given is None or given.is_dir() else given.parent
    vq_files = [path.relative_to(vq_path).as_posix() for path in _files_below(vq_path)]
    return {
        "llama": conversion.base.fingerprint(),
        "tokenizer": tokenizer_folder
        and hash_inputs(tokenizer_folder, small_files(tokenizer_folder)),
        "vqgan": vq_path and hash_inputs(vq_path, vq_files),
        "lineage": conversion.lineage,
        "init": args.init,
        "seed": args.seed,
        "torch_dtype": args.torch_dtype,
        "pad_vocab_multiple": args.pad_vocab_multiple,
    }


# ---- writing ----


def write_base(
    args: argparse.Namespace, conversion: Conversion, request: Mapping[str, Any]
) -> None:
    """Write the whole folder, manifest last."""
    base, layout, target, link = (
        conversion.base,
        conversion.layout,
        args.output_path,
        not args.no_link,
    )
    replace = replaced_tensors(conversion, args.init, args.seed)
    num_bytes = bytes_to_write(base.weights, target, replace, link) + _bytes_beside_weights(
        args.being_vq_path
    )
    resuming = start_target(target, "model", request, num_bytes, args.overwrite)
    if resuming:
        print(f"{target} holds an interrupted conversion with the same inputs: finishing it")
    new_ids = f"new ids {layout.num_text} … {layout.size - 1}"
    print(f"text ids 0 … {layout.num_text - 1}, {new_ids} ({layout.num_visual} rows, {args.init})")
    if base.is_tied:
        print(
            f"{args.llama_path} ties head and embedding: the result has both, so that "
            "their new rows can be trained apart"
        )
    hashes = rewrite_weights(
        base.weights, target, replace, link, keep_finished=resuming, hash_links=args.verify_loading
    )

    write_atomically(
        target / "config.json", to_json(base.extended_config(conversion.num_rows, conversion.dtype))
    )
    write_atomically(target / "generation_config.json", to_json(generation_config(base, layout)))
    write_atomically(target / LAYOUT_FILE, to_json(layout.to_dict()))
    save_tokenizer(conversion.tokenizer, target)
    if args.being_vq_path:
        shutil.rmtree(target / VQGAN_FOLDER, ignore_errors=True)
        shutil.copytree(args.being_vq_path, target / VQGAN_FOLDER)
    if conversion.vbpe:
        conversion.vbpe.save(target / VBPE_FILE)
    for path in [
        path
        for pattern in LICENSE_PATTERNS
        for path in sorted(args.llama_path.glob(pattern))
        if path.is_file()
    ]:
        shutil.copyfile(path, target / path.name)
    counts = {
        "text_rows": layout.num_text,
        "new_rows": layout.num_visual,
        "rows": conversion.num_rows,
    }
    details = {"request": dict(request), "was_tied": base.is_tied}
    finish_target(target, "model", counts, conversion.lineage, details, hashes)


def replaced_tensors(conversion: Conversion, method: str, seed: int) -> dict[str, NewTensor]:
    """The tensors that differ from the base model's: embedding, head, and with --torch_dtype
    every floating one.
    """
    base, weights = conversion.base, conversion.base.weights
    replace = {}
    if conversion.dtype is not None:
        for name in weights:
            if weights.dtype(name).is_floating_point and weights.dtype(name) != conversion.dtype:
                replace[name] = NewTensor(
                    weights.shape(name), conversion.dtype, _caster(weights, name, conversion.dtype)
                )
    for stream, (name, stored) in enumerate(
        [(base.input_name, base.input_name), (base.output_name, base.stored_output_name)]
    ):
        dtype = conversion.dtype or weights.dtype(stored)
        replace[name] = NewTensor(
            (conversion.num_rows, base.hidden_size),
            dtype,
            _row_maker(conversion, stored, dtype, method, seed, stream),
        )
    if base.output_bias_name:
        replace[base.output_bias_name] = _extended_bias(conversion, base.output_bias_name)
    return replace


def _caster(weights: Mapping[str, torch.Tensor], name: str, dtype: torch.dtype) -> Any:
    return lambda: weights[name].to(dtype)


def _row_maker(
    conversion: Conversion, stored: str, dtype: torch.dtype, method: str, seed: int, stream: int
) -> Any:
    def blocks() -> Iterator[torch.Tensor]:
        text_rows = conversion.base.weights[stored]
        for block in text_rows.split(4096):
            yield block.to(dtype)
        visual = (
            _visual_vocabulary(conversion.vqgan, conversion.vbpe) if method == "codebook" else None
        )
        for rows in make_rows(method, text_rows, conversion.layout, seed, stream, visual):
            yield torch.from_numpy(np.ascontiguousarray(rows)).to(dtype)
        if padding := conversion.num_rows - conversion.layout.size:
            yield torch.zeros(padding, conversion.base.hidden_size, dtype=dtype)

    return blocks


def _extended_bias(conversion: Conversion, name: str) -> NewTensor:
    weights = conversion.base.weights
    dtype = conversion.dtype or weights.dtype(name)
    new = torch.zeros(conversion.num_rows - conversion.layout.num_text, dtype=dtype)
    return NewTensor(
        (conversion.num_rows,), dtype, lambda: torch.cat([weights[name].to(dtype), new])
    )


def generation_config(base: BaseModel, layout: VocabLayout) -> dict[str, Any]:
    """The base model's generation_config.json with this vocabulary's pad and with its eos among
    the stops.
    """
    path = base.folder / "generation_config.json"
    config: dict[str, Any] = read_json(path, "a model folder") if path.is_file() else {}
    stops = config.get("eos_token_id")
    others = [
        stop
        for stop in (stops if isinstance(stops, list) else [stops])
        if stop not in (None, layout.eos_id)
    ]
    config["eos_token_id"] = [layout.eos_id, *others] if others else layout.eos_id
    config.update(bos_token_id=layout.bos_id, pad_token_id=layout.pad_id)
    return config


def _bytes_beside_weights(vq_path: Path | None) -> int:
    """Upper bound of what tokenizer, configs and VQ-GAN take."""
    return 64_000_000 + sum(path.stat().st_size for path in _files_below(vq_path))


def _files_below(folder: Path | None) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()] if folder else []
