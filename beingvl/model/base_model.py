"""The language model that a conversion starts from: its config, its embeddings' names, its number
of text ids.

No weights are loaded. transformers builds the model on the meta device, which gives the names of
input embedding and output head for any architecture; shapes come from the weight files' headers.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from transformers import AutoConfig, AutoModelForCausalLM

from beingvl.artefact.hashes import PREFIX, hash_bytes, hash_file
from beingvl.artefact.manifest import MANIFEST_FILE, verify_small_files
from beingvl.errors import InputError
from beingvl.json_file import read_object
from beingvl.model.weight_files import LICENSE_PATTERNS, WeightFolder
from beingvl.published_form import PUBLISHED_MODEL_TYPE, chameleon_error, refuse_published

SMALL_FILES = ("*.json", "*.jinja", "*.txt", "tokenizer*", "original/tokenizer.model")


@dataclass(frozen=True)
class BaseModel:
    """A causal language model on disk.

    `input_name` and `output_name` are the tensors with one row per token id; `output_bias_name` is
    the head's bias, if any. `stored_output_name` is the tensor that holds the head's values: the
    input embedding if the two are tied.
    """

    folder: Path
    config: dict[str, Any]
    weights: WeightFolder
    input_name: str
    output_name: str
    stored_output_name: str
    output_bias_name: str | None
    num_text: int
    hidden_size: int

    @property
    def is_tied(self) -> bool:
        return self.stored_output_name != self.output_name

    @classmethod
    def open(cls, folder: Path | str) -> BaseModel:
        """Raises InputError for other kinds of folders, or if weights and config do not match."""
        folder = Path(folder)
        verify_small_files(folder)
        config = read_json(folder / "config.json", "a Hugging Face model folder")
        weights = WeightFolder(folder)
        refuse_chameleon(folder, config, weights)
        refuse_published(folder)
        model = _empty_model(folder, len(weights))
        _refuse_quantised(folder, config, weights, set(model.state_dict()))
        input_name = _module_parameter(model, model.get_input_embeddings(), "weight")
        head = model.get_output_embeddings()
        output_name = _module_parameter(model, head, "weight")
        if input_name is None or output_name is None:
            name = type(model).__name__
            raise InputError(f"{folder}: {name} has no input embedding or no output head to extend")
        bias_name = None
        if getattr(head, "bias", None) is not None:
            bias_name = _module_parameter(model, head, "bias")
        tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
        stored_output = output_name if output_name in weights else input_name
        for name in [input_name] if tied else [input_name, output_name]:
            if name not in weights:
                raise InputError(f"{folder}: the weights have no {name!r}; is config.json theirs?")
        _check_shapes(folder, weights, input_name, stored_output, model)
        num_text, hidden_size = weights.shape(input_name)
        return cls(
            folder,
            config,
            weights,
            input_name,
            output_name,
            stored_output,
            bias_name,
            num_text,
            hidden_size,
        )

    def fingerprint(self) -> str:
        """Hash of what a conversion reads: small files as a whole, weight files by samples."""
        hashes = {name: hash_file(self.folder / name) for name in small_files(self.folder)}
        hashes |= {name: _hash_sample(self.folder / name) for name in self.weights.files}
        return hash_bytes(json.dumps(hashes, sort_keys=True).encode())

    def special_id(self, name: str, fallback: int | None) -> int | None:
        """`bos_token_id` or `eos_token_id` of config.json (the first of a list), or `fallback`."""
        value = _text_config(self.config).get(name, self.config.get(name))
        value = value[0] if isinstance(value, list) and value else value
        return value if isinstance(value, int) else fallback

    def special_ids(self, name: str) -> set[int]:
        """All ids with that name in config.json and generation_config.json."""
        path = self.folder / "generation_config.json"
        generation = read_json(path, "a model folder") if path.is_file() else {}
        ids: list[Any] = []
        for fields in (_text_config(self.config), self.config, generation):
            value = fields.get(name)
            ids += value if isinstance(value, list) else [value]
        return {one for one in ids if isinstance(one, int)}

    def extended_config(
        self, num_rows: int, pad_id: int, dtype: torch.dtype | None
    ) -> dict[str, Any]:
        """config.json for `num_rows` rows, a separate pad token and an untied head; all other keys
        are kept.
        """
        config = copy.deepcopy(self.config)
        for fields in (config, _text_config(config)):
            if fields is _text_config(config) or "pad_token_id" in fields:
                fields["pad_token_id"] = pad_id
            if fields is _text_config(config) or "vocab_size" in fields:
                fields["vocab_size"] = num_rows
            if fields is config or "tie_word_embeddings" in fields:
                fields["tie_word_embeddings"] = False
        if dtype is not None:
            dtype_keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
            config.update(dict.fromkeys(dtype_keys, str(dtype).removeprefix("torch.")))
        return config


def small_files(folder: Path) -> list[str]:
    """Names of the configs, tokenizer files and licences of a model or tokenizer folder."""
    patterns = (*SMALL_FILES, *LICENSE_PATTERNS)
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(
        path.relative_to(folder).as_posix() for path in paths if path.name != MANIFEST_FILE
    )


def _hash_sample(path: Path) -> str:
    """Hash of a file's size and of 64 evenly spaced pieces of 256 KiB.

    It only decides whether a finished conversion has the same base; reading 16 GB for that would
    take as long as the conversion. Manifests hash all bytes of every file.
    """
    size, piece, count = path.stat().st_size, 1 << 18, 64
    digest = blake3(str(size).encode())
    with open(path, "rb") as file:
        for number in range(count):
            file.seek(max(0, size - piece) * number // (count - 1))
            digest.update(file.read(piece))
    return "sampled-" + PREFIX + digest.hexdigest()


def read_json(path: Path, what: str) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path.parent} has no {path.name}, so it is not {what}")
    return read_object(path, "download it again")


def refuse_chameleon(folder: Path, config: dict[str, Any], weights: WeightFolder) -> None:
    """Raises InputError for a model in the published form that has Chameleon's weights."""
    if config.get("model_type") == PUBLISHED_MODEL_TYPE and any(".q_norm." in k for k in weights):
        raise chameleon_error(folder)


def _refuse_quantised(
    folder: Path, config: dict[str, Any], weights: WeightFolder, known: set[str]
) -> None:
    """Raises InputError for weights that need separate scales, because the scales would be ignored.
    `known` are the names of the model's own tensors.
    """
    found = ""
    for fields in (config, _text_config(config)):
        if quantisation := fields.get("quantization_config"):
            method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
            found = f"config.json has quantization_config ({method or quantisation})"
    for name, stored in weights.tensors.items():
        is_weight = name in known or name.endswith("weight")
        if "_scale" in name and name not in known:
            found = found or f"the weights have {name!r}"
        elif is_weight and stored.dtype not in ("F64", "F32", "F16", "BF16"):
            found = found or f"{name!r} is {stored.dtype}"
    if found:
        raise InputError(
            f"{folder} is quantised: {found}; give the checkpoint in bfloat16, float16 or float32"
        )


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of config.json about the language model: all of it, or `text_config`."""
    text_config = config.get("text_config")
    return text_config if isinstance(text_config, dict) and "vocab_size" not in config else config


def _empty_model(folder: Path, num_tensors: int) -> Any:
    """The model without weights, on the meta device. Raises InputError if the config has more
    layers than there are tensors, because building such a model could take forever.
    """
    config = open_config(folder)
    num_layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if num_layers > num_tensors:
        raise InputError(
            f"{folder / 'config.json'} says {num_layers} layers, the weights are {num_tensors} "
            "tensors; download the folder again"
        )
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # contradictory sizes fail anywhere in its code
        raise _not_a_model(folder, error) from error


def open_config(path: Path) -> Any:
    """The transformers configuration of a model folder, or of its config.json.

    Raises InputError if it is damaged.
    """
    file = path / "config.json" if path.is_dir() else path
    read_json(file, "a Hugging Face model folder")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # each configuration class checks its fields in its own way
        raise _not_a_model(file.parent, error) from error


def _not_a_model(folder: Path, error: Exception) -> InputError:
    path, reason = folder / "config.json", " ".join(str(error).split())[:300]
    return InputError(f"{path} is not a causal language model that transformers knows ({reason})")


def _module_parameter(model: Any, module: Any, attribute: str) -> str | None:
    """Full name of `module.attribute` inside `model`."""
    for name, candidate in model.named_modules():
        if candidate is module:
            return f"{name}.{attribute}"
    return None


def _check_shapes(
    folder: Path, weights: WeightFolder, input_name: str, output_name: str, model: Any
) -> None:
    def check(name: str, shape: tuple[int, ...]) -> None:
        if weights.shape(name) != shape:
            raise InputError(
                f"{folder}: {name!r} is {list(weights.shape(name))}, config.json says "
                f"{list(shape)}; the config and the weights are not of the same model"
            )

    for name in (input_name, output_name):
        check(name, tuple(model.get_input_embeddings().weight.shape))
    parameters = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    prefix = "".join(f"{part}." for part in input_name.split(".")[:-2])
    known = any(
        name in parameters for name in weights if name.startswith(prefix) and name != input_name
    )
    if not known and not weights.keys() <= parameters.keys():
        return  # an older checkpoint, whose names transformers translates while loading
    for name, shape in parameters.items():
        if name not in weights and name != output_name:
            raise InputError(
                f"{folder}: the weights have no {name!r}, which config.json asks for; download "
                "the checkpoint again"
            )
        if name in weights:
            check(name, shape)
