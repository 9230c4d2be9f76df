"""[3] Any LLaMA + vocabulary -> Being-VL base/: extended embedding, head and tokenizer, with the
VQ-GAN inside.

    plan_conversion    checks headers, tokenizer, VQ-GAN and vBPE against each other
    write_base         writes weights tensor by tensor, configs, tokenizer, VQ-GAN, vBPE, manifest
    verify_conversion  compares the result, loaded by stock transformers, with the base model

The checkpoint is never loaded as a model. Everything but the weights is read and checked before
anything is written.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from beingvl.artefact.files import copy_inside, to_json, write_atomically
from beingvl.artefact.hashes import hash_files
from beingvl.artefact.manifest import (
    MANIFEST_FILE,
    Manifest,
    join_lineages,
    read_manifest,
    verify_small_files,
)
from beingvl.artefact.owner import making
from beingvl.data.chat_template import BASE_TEMPLATE
from beingvl.errors import InputError, check_at_least
from beingvl.images.vqgan import PREPROCESSOR_FILE, VQGAN
from beingvl.model import tokenizer_files
from beingvl.model.base_model import BaseModel, read_json, small_files
from beingvl.model.conversion_check import verify_conversion
from beingvl.model.new_rows import METHODS, VisualVocabulary, check_visual_vocabulary, make_rows
from beingvl.model.rewrite_weights import NewTensor, bytes_to_write, rewrite_weights
from beingvl.model.target_folder import (
    VBPE_FILE,
    VQGAN_FOLDER,
    check_target,
    finish_target,
    start_target,
)
from beingvl.model.weight_files import LICENSE_PATTERNS
from beingvl.vbpe.visual_bpe import AnyVBPE, VisualBPE
from beingvl.vocab import LAYOUT_FILE, VocabLayout

DEFAULT_CODES = DEFAULT_MERGES = 8192
DTYPES = ("auto", "float32", "bfloat16", "float16")
_ROWS = 4096


class ConversionDiffersError(Exception):
    """`verify_loading` found that the result differs from the base model; the table says where."""


@contextmanager
def _collecting_rarely() -> Iterator[None]:
    """Saves a fifth of the startup: transformers and the tokenizer make a million objects, none of
    them garbage.
    """
    before = gc.get_threshold()
    gc.set_threshold(100_000, 50, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


@_collecting_rarely()
def convert(
    llama_path: Path | str,
    output_path: Path | str,
    *,
    being_vq_path: Path | str | None = None,
    vbpe: Path | str | None = None,
    being_tokenizer_config_path: Path | str | None = None,
    num_merges: int | None = None,
    vocab_size: int | None = None,
    extended_vocab_size: int | None = None,
    init: str = "he",
    seed: int = 0,
    torch_dtype: str = "auto",
    pad_vocab_multiple: int = 1,
    link: bool = True,
    overwrite: bool = False,
    verify_loading: bool = False,
) -> Manifest:
    """Write the Being-VL base of a causal language model; a finished base of the same request is
    reused.

    Args:
        llama_path: folder of any causal LM of transformers.
        being_vq_path: VQ-GAN folder, copied into the result; None means 8192 codes.
        vbpe: vbpe.json; sets the number of merges and is copied into the result.
        being_tokenizer_config_path: a tokenizer with the visual tokens; None makes one.
        num_merges: number of vBPE ids to reserve; None takes those of `vbpe`, else 8192.
        vocab_size: number of text ids that the base model must have; only checked.
        extended_vocab_size: number of all ids, or of new ids if less than the text ids; sets
            `num_merges`.
        init: how to initialise new rows, one of `new_rows.METHODS`, with `seed`.
        torch_dtype: of the weights; "auto" is the base model's.
        pad_vocab_multiple: zero rows are added up to a multiple of this number.
        link: hard-link unchanged weight files if the file system can.
        verify_loading: load the result and compare it with the base model.

    Raises InputError, before anything is written, for inputs that do not fit together, and
    ConversionDiffersError if `verify_loading` finds a difference.
    """
    inputs = {
        "--llama_path": llama_path,
        "--being_tokenizer_config_path": being_tokenizer_config_path,
        "--vqgan": being_vq_path,
        "--vbpe": vbpe,
    }
    paths = {option: Path(path) for option, path in inputs.items() if path is not None}
    output = Path(output_path)
    check_target(output, paths)
    sizes = {
        "--vocab_size": vocab_size,
        "--num_merges": num_merges,
        "--extended_vocab_size": extended_vocab_size,
        "--pad_vocab_multiple": pad_vocab_multiple,
    }
    conversion = plan_conversion(paths, sizes, NewRows(init, seed), torch_dtype)
    with making(output, "model", conversion.request, overwrite) as is_new:
        if is_new:
            write_base(conversion, output, link)
    vq_path = paths.get("--vqgan")
    if verify_loading and not verify_conversion(conversion.base, output, vq_path):
        raise ConversionDiffersError(f"{output} differs from {llama_path}")
    return read_manifest(output)


# ---- reading and checking ----


class NewRows(NamedTuple):
    """How new rows are initialised."""

    method: str
    seed: int


@dataclass(frozen=True)
class Conversion:
    """All inputs of a conversion, checked against each other. `visual` is what `--init codebook`
    needs; `request` is what determines the result.
    """

    base: BaseModel
    layout: VocabLayout
    tokenizer: PreTrainedTokenizerFast
    base_template: str | None
    paths: Mapping[str, Path]
    vbpe: AnyVBPE | None
    visual: VisualVocabulary | None
    new_rows: NewRows
    num_rows: int
    dtype: torch.dtype | None
    request: Mapping[str, Any]


def plan_conversion(
    paths: Mapping[str, Path], sizes: Mapping[str, int | None], new_rows: NewRows, torch_dtype: str
) -> Conversion:
    """Read all inputs except weights. Raises InputError if they do not fit together."""
    multiple = sizes["--pad_vocab_multiple"] or 0
    check_at_least(1, pad_vocab_multiple=multiple)
    check_at_least(0, seed=new_rows.seed)
    for option, value, known in [
        ("--init", new_rows.method, METHODS),
        ("--dtype", torch_dtype, DTYPES),
    ]:
        if value not in known:
            raise InputError(f"{option} is {value!r}, expected one of {', '.join(known)}")
    base = BaseModel.open(paths["--llama_path"])
    vqgan = None
    if "--vqgan" in paths:
        vqgan = VQGAN.load(paths["--vqgan"], preprocessing=_preprocessing(paths))
    num_codes = vqgan.num_codes if vqgan else None
    vbpe = VisualBPE.load(paths["--vbpe"], num_codes) if "--vbpe" in paths else None
    if vbpe and vqgan:
        _check_vbpe_belongs_to(vbpe, vqgan, paths)
    own_tokenizer = _base_tokenizer(paths, base)
    layout = _make_layout(base, own_tokenizer, vqgan, vbpe, sizes)
    tokenizer = _make_tokenizer(paths, base, own_tokenizer, layout)
    visual = None
    if new_rows.method == "codebook":
        merges = _codes_of_merges(vbpe) if vbpe else []
        visual = VisualVocabulary(vqgan.codebook, merges) if vqgan else None
        check_visual_vocabulary(visual, layout)
    lineage = {"vocab": layout.fingerprint()}
    lineage |= {"vqgan": vqgan.fingerprint()} if vqgan else {}
    lineage |= {"vbpe": vbpe.fingerprint()} if vbpe else {}
    return Conversion(
        base,
        layout,
        tokenizer,
        own_tokenizer.chat_template if own_tokenizer else None,
        paths,
        vbpe,
        visual,
        new_rows,
        num_rows=-(-layout.size // multiple) * multiple,
        dtype=None if torch_dtype == "auto" else getattr(torch, torch_dtype),
        request={
            **_input_hashes(paths, base),
            "lineage": lineage,
            "init": new_rows.method,
            "seed": new_rows.seed,
            "torch_dtype": torch_dtype,
            "pad_vocab_multiple": multiple,
        },
    )


def _input_hashes(paths: Mapping[str, Path], base: BaseModel) -> dict[str, str | None]:
    tokenizer, vqgan = _tokenizer_folder(paths), paths.get("--vqgan")
    return {
        "llama": base.fingerprint(),
        "tokenizer": hash_files(tokenizer, small_files(tokenizer)) if tokenizer else None,
        "vqgan": hash_files(vqgan, _files_below(vqgan)) if vqgan else None,
    }


def _tokenizer_folder(paths: Mapping[str, Path]) -> Path | None:
    """The folder of --being_tokenizer_config_path, which may be a file in it."""
    given = paths.get("--being_tokenizer_config_path")
    return given if given is None or given.is_dir() else given.parent


def _preprocessing(paths: Mapping[str, Path]) -> Path | None:
    """The image processor's settings beside the given tokenizer, which is where Being-VL-0.5 has
    them; for a VQ-GAN without its own.
    """
    folder = _tokenizer_folder(paths)
    path = folder / PREPROCESSOR_FILE if folder else None
    return path if path and path.is_file() else None


def _check_vbpe_belongs_to(vbpe: AnyVBPE, vqgan: VQGAN, paths: Mapping[str, Path]) -> None:
    vq_path, vbpe_path = paths["--vqgan"], paths["--vbpe"]
    join_lineages({str(vq_path): {"vqgan": vqgan.fingerprint()}, str(vbpe_path): vbpe.lineage})
    if vbpe.num_codes != vqgan.num_codes:
        raise InputError(
            f"{vbpe_path} is for {vbpe.num_codes} codes, {vq_path} has {vqgan.num_codes}; train "
            "the vBPE on its codes"
        )


def _base_tokenizer(paths: Mapping[str, Path], base: BaseModel) -> PreTrainedTokenizerFast | None:
    """The base model's own tokenizer; None if it has none and the given one takes its place."""
    given = paths.get("--being_tokenizer_config_path")
    if (base.folder / LAYOUT_FILE).is_file():
        raise InputError(
            f"{base.folder} is a Being-VL model folder already; give the model it was made from"
        )
    if given and tokenizer_files.find_tokenizer_file(base.folder) is None:
        return None
    tokenizer = tokenizer_files.load_tokenizer(base.folder, base.num_text)
    tokenizer_files.check_belongs_to(tokenizer, base)
    if isinstance(tokenizer.chat_template, dict):  # of several, the one for plain conversations
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    if tokenizer.chat_template:
        kept = f"its own chat template is kept as {BASE_TEMPLATE!r}"
        print(f"{base.folder}: prompts are Being-VL's, {kept}")
    return tokenizer


def _make_layout(
    base: BaseModel,
    tokenizer: PreTrainedTokenizerFast | None,
    vqgan: VQGAN | None,
    vbpe: AnyVBPE | None,
    sizes: Mapping[str, int | None],
) -> VocabLayout:
    wanted_text, num_text = sizes["--vocab_size"], base.num_text
    if wanted_text not in (None, num_text):
        raise InputError(
            f"--vocab_size is {wanted_text}, but {base.folder} has {num_text} text ids"
        )
    num_vq = vqgan.num_codes if vqgan else vbpe.num_codes if vbpe else DEFAULT_CODES
    bos_id = base.special_id("bos_token_id", tokenizer.bos_token_id if tokenizer else None)
    eos_id = base.special_id("eos_token_id", tokenizer.eos_token_id if tokenizer else None)
    if eos_id is None:
        config = base.folder / "config.json"
        raise InputError(f"{config} has no eos_token_id and its tokenizer names none; add it")
    bos_id = eos_id if bos_id is None else bos_id
    num_base = VocabLayout(num_text, num_vq, 0, bos_id, eos_id).size

    wanted = {"--vbpe": vbpe.num_merges} if vbpe else {}
    if (num_merges := sizes["--num_merges"]) is not None:
        wanted["--num_merges"] = num_merges
    if (extended := sizes["--extended_vocab_size"]) is not None:
        # Being-VL-0.5's commands count only new ids.
        all_ids = extended + num_text if extended < num_text else extended
        if all_ids < num_base:
            raise InputError(
                f"--extended_vocab_size is {extended}, but {num_text} text ids, 5 specials and "
                f"{num_vq} codes already make {num_base} ({num_base - num_text} new ones)"
            )
        wanted["--extended_vocab_size"] = all_ids - num_base
    if len(set(wanted.values())) > 1:
        found = ", ".join(f"{source} means {count}" for source, count in wanted.items())
        raise InputError(f"the number of merges is contradictory: {found}; give one of them")
    num_merges = next(iter(wanted.values()), DEFAULT_MERGES)
    return VocabLayout(num_text, num_vq, num_merges, bos_id, eos_id)


def _make_tokenizer(
    paths: Mapping[str, Path],
    base: BaseModel,
    own: PreTrainedTokenizerFast | None,
    layout: VocabLayout,
) -> PreTrainedTokenizerFast:
    """The given tokenizer, checked, or the base model's extended by the new tokens."""
    folder = _tokenizer_folder(paths)
    if folder is None:
        assert own is not None
        tokenizer_files.extend_tokenizer(own, layout, str(base.folder))
        tokenizer_files.clear_limits(own, str(base.folder))
        tokenizer_files.check_token_ids(own, layout, str(base.folder))
        return own
    layout_file = folder / LAYOUT_FILE  # the vocabulary that it was made for
    if layout_file.is_file() and (found := VocabLayout.read(layout_file)) != layout:
        raise InputError(
            f"{layout_file} is {found.to_dict()}, this conversion makes "
            f"{layout.to_dict()}; give the tokenizer made for this vocabulary, or none"
        )
    verify_small_files(folder)
    tokenizer = tokenizer_files.load_tokenizer(folder)
    tokenizer_files.add_missing_merges(tokenizer, layout)
    source = str(paths["--being_tokenizer_config_path"])
    tokenizer_files.clear_limits(tokenizer, source)
    tokenizer_files.check_token_ids(tokenizer, layout, source)
    tokenizer_files.check_vocabulary_map(tokenizer, folder / "config.json")
    if own is not None:
        tokenizer_files.check_same_text_tokens(tokenizer, own, source)
    return tokenizer


def _codes_of_merges(vbpe: AnyVBPE) -> list[np.ndarray]:
    """The codes that each merge covers, one entry per cell."""
    codes = [np.array([code]) for code in range(vbpe.num_codes)]
    for a, b, *_ in vbpe.merges.tolist():
        codes.append(np.concatenate([codes[a], codes[b]]))
    return codes[vbpe.num_codes :]


# ---- writing ----


def write_base(conversion: Conversion, target: Path, link: bool) -> None:
    """Write the whole folder, manifest last."""
    base, layout = conversion.base, conversion.layout
    vq_path = conversion.paths.get("--vqgan")
    replace = replaced_tensors(conversion)
    beside = _bytes_beside_weights(conversion)
    if vq_path:
        beside += sum((vq_path / name).stat().st_size for name in _files_below(vq_path))
    start_target(target, "model", bytes_to_write(base.weights, target, replace, link) + beside)
    print(
        f"text ids 0 … {layout.num_text - 1}, new ids {layout.num_text} … {layout.size - 1} "
        f"({layout.num_visual} rows, {conversion.new_rows.method})"
    )
    if base.is_tied:
        print(f"{base.folder} ties head and embedding: the result has both, trained separately")
    hashes = rewrite_weights(base.weights, target, replace, link)

    configs = {
        "config.json": base.extended_config(conversion.num_rows, layout.pad_id, conversion.dtype),
        "generation_config.json": generation_config(base, layout),
        LAYOUT_FILE: layout.to_dict(),
    }
    for name, fields in configs.items():
        write_atomically(target / name, to_json(fields))
    tokenizer_files.save_tokenizer(conversion.tokenizer, target, conversion.base_template)
    if vq_path:
        names = [
            path.relative_to(vq_path).as_posix() for path in vq_path.rglob("*") if path.is_file()
        ]
        copy_inside(vq_path, target / VQGAN_FOLDER, names)
        preprocessing = _preprocessing(conversion.paths)
        if preprocessing and not (vq_path / PREPROCESSOR_FILE).is_file():
            shutil.copyfile(preprocessing, target / VQGAN_FOLDER / PREPROCESSOR_FILE)
    if conversion.vbpe:
        conversion.vbpe.save(target / VBPE_FILE)
    licences = [path for pattern in LICENSE_PATTERNS for path in base.folder.glob(pattern)]
    copy_inside(base.folder, target, [path.name for path in licences if path.is_file()])
    counts = {"text_rows": layout.num_text, "new_rows": layout.num_visual}
    counts["rows"] = conversion.num_rows
    details = {"request": dict(conversion.request), "was_tied": base.is_tied}
    finish_target(target, "model", counts, conversion.request["lineage"], details, hashes)


def _bytes_beside_weights(conversion: Conversion) -> int:
    """Upper bound for tokenizer and configs: a tokenizer.model becomes JSON of eight times its
    size, a new token takes 200 bytes.
    """
    known = small_files(conversion.base.folder)
    num_bytes = sum((conversion.base.folder / name).stat().st_size for name in known)
    return 1_000_000 + 10 * num_bytes + 400 * conversion.layout.num_visual


def replaced_tensors(conversion: Conversion) -> dict[str, NewTensor]:
    """The tensors that differ from the base model's: embedding, head, and all that are cast."""
    base, dtype, weights = conversion.base, conversion.dtype, conversion.base.weights
    replace = {}
    if dtype is not None:
        for name in weights:
            if weights.dtype(name).is_floating_point and weights.dtype(name) != dtype:
                cast = partial(_cast, weights, name, dtype)
                replace[name] = NewTensor(weights.shape(name), dtype, cast)
    names = [(base.input_name, base.input_name), (base.output_name, base.stored_output_name)]
    for stream, (name, stored) in enumerate(names):
        rows_dtype = dtype or weights.dtype(stored)
        make = partial(_extended_rows, conversion, stored, rows_dtype, stream)
        replace[name] = NewTensor((conversion.num_rows, base.hidden_size), rows_dtype, make)
    if bias := base.output_bias_name:
        bias_dtype = dtype or weights.dtype(bias)
        make = partial(_extended_bias, conversion, bias, bias_dtype)
        replace[bias] = NewTensor((conversion.num_rows,), bias_dtype, make)
    return replace


def _cast(weights: Mapping[str, torch.Tensor], name: str, dtype: torch.dtype) -> torch.Tensor:
    return weights[name].to(dtype)


def _extended_rows(
    conversion: Conversion, stored: str, dtype: torch.dtype, stream: int
) -> Iterator[torch.Tensor]:
    """Text rows, new rows and padding, in blocks."""
    text_rows = conversion.base.weights[stored]
    for block in text_rows.split(_ROWS):
        yield block.to(dtype)
    layout, (method, seed) = conversion.layout, conversion.new_rows
    for rows in make_rows(method, text_rows, layout, seed, stream, conversion.visual):
        yield torch.from_numpy(np.ascontiguousarray(rows)).to(dtype)
    if padding := conversion.num_rows - layout.size:
        yield torch.zeros(padding, conversion.base.hidden_size, dtype=dtype)


def _extended_bias(conversion: Conversion, name: str, dtype: torch.dtype) -> torch.Tensor:
    new = torch.zeros(conversion.num_rows - conversion.layout.num_text, dtype=dtype)
    return torch.cat([conversion.base.weights[name].to(dtype), new])


def generation_config(base: BaseModel, layout: VocabLayout) -> dict[str, Any]:
    """The base model's generation config, with this vocabulary's pad, and its eos first among the
    stops.
    """
    path = base.folder / "generation_config.json"
    config: dict[str, Any] = read_json(path, "a model folder") if path.is_file() else {}
    stops = config.get("eos_token_id")
    stops = stops if isinstance(stops, list) else [stops]
    others = [stop for stop in stops if stop not in (None, layout.eos_id)]
    config["eos_token_id"] = [layout.eos_id, *others] if others else layout.eos_id
    config.update(bos_token_id=layout.bos_id, pad_token_id=layout.pad_id)
    return config


def _files_below(folder: Path) -> list[str]:
    """Names of all files below a folder, except manifests."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return [path.relative_to(folder).as_posix() for path in paths if path.name != MANIFEST_FILE]
