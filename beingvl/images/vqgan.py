"""The VQ-GAN: images to grids of codes and, if it has a decoder, back.

    PIL images ──preprocess──> pixels [N, 3, H, W] float32 ──encode──> codes [N, h, w] uint16
    ──decode──> [N, H, W, 3] uint8

Two transformers classes are supported; `model_type` in the folder's config.json selects one:

    chameleon_vqgan    ChameleonVQVAE, the published being-vq-8k layout: 512 px, 32 x 32 grid,
                       8192 codes; encoder only
    janus_vqgan        JanusVQVAE, the same family with a decoder; `beingvl train-vq` makes these

Both need a stock folder: config.json, model.safetensors and preprocessor_config.json (Chameleon's
image processor: shortest edge, centre crop, rescaling, mean and standard deviation).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import ChameleonVQVAE, ChameleonVQVAEConfig, JanusVQVAE, JanusVQVAEConfig
from transformers.models.chameleon.image_processing_pil_chameleon import ChameleonImageProcessorPil

from beingvl.artefact.files import give_usual_mode, write_atomically
from beingvl.artefact.manifest import (
    Manifest,
    is_complete,
    read_manifest,
    start_folder,
    verify_file,
    write_manifest,
)
from beingvl.errors import InputError
from beingvl.images.decode import picture_of
from beingvl.images.preprocess import Preprocess
from beingvl.json_file import read_object
from beingvl.published_form import refuse_published
from beingvl.vocab import LAYOUT_FILE

CLASSES = {
    "chameleon_vqgan": (ChameleonVQVAE, ChameleonVQVAEConfig),
    "janus_vqgan": (JanusVQVAE, JanusVQVAEConfig),
}
PREPROCESSING_FIELDS = (
    *("do_convert_rgb", "do_resize", "size", "resample", "do_center_crop", "crop_size"),
    *("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
)
PREPROCESSOR_FILE = "preprocessor_config.json"
FILES = ("config.json", "model.safetensors", PREPROCESSOR_FILE)  # of a stock folder
MAX_CODES = 1 << 16


class VQGAN:
    """A VQ-GAN and its preprocessing. `dtype` is the encoder's; codes are looked up in float32."""

    def __init__(
        self,
        model: ChameleonVQVAE | JanusVQVAE,
        processor: ChameleonImageProcessorPil,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        source: str = "VQ-GAN",
        exif: str = "apply",
    ) -> None:
        """`exif` "ignore" leaves images as stored in their files (preprocess.py)."""
        self.source = source
        self.processor, self.preprocessing = processor, Preprocess(processor, exif)
        self.image_size = _image_size(processor, source)
        self.grid = _grid(model, self.image_size, source)
        if model.config.num_embeddings > MAX_CODES:
            raise InputError(
                f"{source} has {model.config.num_embeddings} codes, expected at most "
                f"{MAX_CODES} (16 bits)"
            )
        self._fingerprint = _hash_what_decides_codes(model, processor)
        self._device, self._dtype = torch.device(device), dtype
        codebook = model.quantize.embedding.weight.detach().float().clone()  # never rounded
        self.model = model.eval().requires_grad_(False).to(device=device, dtype=dtype)
        self.model.quantize.float()
        self.model.quantize.embedding.weight.data.copy_(codebook)

    @classmethod
    def load(
        cls,
        folder: Path | str,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        preprocessing: Path | None = None,
        exif: str = "apply",
    ) -> VQGAN:
        """Read a stock folder, made by `beingvl train-vq` or published.

        `preprocessing` is the preprocessor_config.json for a folder without one. Raises InputError
        if the folder has a different one, is not a VQ-GAN's, or is damaged.
        """
        folder = Path(folder)
        refuse_published(folder, "/vqgan")
        _verify_files(folder)
        fields = _read_json(folder / "config.json", "a VQ-GAN folder")
        path = _preprocessor_file(folder, preprocessing)
        options = {"device": device, "dtype": dtype, "exif": exif}
        return cls.build(fields, _read_weights(folder), path, folder, **options)

    @classmethod
    def build(
        cls,
        fields: Mapping[str, Any],
        weights: Mapping[str, torch.Tensor],
        preprocessing: Path,
        folder: Path,
        **options: Any,
    ) -> VQGAN:
        """A VQ-GAN from its config, its tensors by name and its preprocessor_config.json (optional
        for Chameleon's). `folder` is where they come from; `options` as for the class.
        """
        config, found = folder / "config.json", fields.get("model_type")
        if found not in CLASSES:
            expected = " or ".join(CLASSES)
            raise InputError(f"{config}: model_type is {found!r}, expected {expected}")
        model_class, config_class = CLASSES[found]
        try:
            model = model_class(config_class.from_dict(dict(fields)))
        except (TypeError, ValueError, StrictDataclassError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{config} is not usable ({reason})") from error
        _load_weights(model, weights, folder)
        processor = _load_processor(preprocessing, model)
        return cls(model, processor, source=str(folder), **options)

    def save(
        self,
        folder: Path | str,
        counts: Mapping[str, int | float] | None = None,
        details: Mapping[str, Any] | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> Manifest:
        """Write a stock folder, with `files` beside the weights, and its manifest."""
        assert self._dtype == torch.float32, "another dtype has lost the bits it would save"
        folder = start_folder(folder, "vqgan")
        # the model's own save_pretrained loads DeepSpeed and draws a bar for the same bytes
        config = self.model.config
        config.architectures, config.dtype = [type(self.model).__name__], "float32"
        config.save_pretrained(folder)
        save_file(self.model.state_dict(), folder / "model.safetensors", {"format": "pt"})
        give_usual_mode(folder / "model.safetensors")
        self.processor.save_pretrained(folder)
        for name, data in (files or {}).items():
            write_atomically(folder / name, data)
        # A user's files in this folder are never listed or removed.
        written = {*FILES, *(files or {})}
        details = {**self.sizes(), **(details or {})}
        lineage = {"vqgan": self._fingerprint}
        return write_manifest(
            folder, "vqgan", counts or {}, lineage, details, belongs=written.__contains__
        )

    def sizes(self) -> dict[str, Any]:
        """What a manifest records about the VQ-GAN."""
        grid, side = list(self.grid), self.image_size
        return {"num_codes": self.num_codes, "grid": grid, "image_size": side}

    def fingerprint(self) -> str:
        """Hash of everything that determines codes: encoder, code book, preprocessing. Equal
        fingerprints mean equal codes.

        The decoder is left out: adding, removing or replacing it does not invalidate codes.
        """
        return self._fingerprint

    @property
    def dtype(self) -> str:
        """The encoder's dtype, such as "bfloat16"."""
        return str(self._dtype).removeprefix("torch.")

    @property
    def num_codes(self) -> int:
        return self.model.config.num_embeddings

    @property
    def has_decoder(self) -> bool:
        return isinstance(self.model, JanusVQVAE)

    @property
    def codebook(self) -> np.ndarray:
        """Code vectors `[num_codes, dim]` float32."""
        return self.model.quantize.embedding.weight.detach().cpu().numpy().copy()

    def preprocess(self, images: Sequence[Any]) -> torch.Tensor:
        """Images, as `picture_of` takes them, to pixels `[N, 3, H, W]` float32; transparent areas
        become white.
        """
        cropped = [
            self.preprocessing.crop(*picture_of(one, f"image {number}"))
            for number, one in enumerate(images)
        ]
        empty = torch.empty(0, 3, self.image_size, self.image_size)
        return self.preprocessing.to_pixels(cropped) if cropped else empty

    @torch.inference_mode()
    def encode(self, pixel_values: torch.Tensor) -> np.ndarray:
        """Pixels `[N, 3, H, W]` to codes `[N, h, w]` uint16."""
        side = self.image_size
        if tuple(pixel_values.shape[1:]) != (3, side, side):
            found = list(pixel_values.shape)
            raise InputError(f"{self.source}: pixels are {found}, expected [N, 3, {side}, {side}]")
        pixels = pixel_values.to(device=self._device, dtype=self._dtype)
        with self._whole_float32():
            latents = self.model.quant_conv(self.model.encoder(pixels))
        _, _, indices = self.model.quantize(latents.float())
        return indices.view(-1, *self.grid).cpu().numpy().astype(np.uint16)

    @torch.inference_mode()
    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Codes `[N, h, w]` to images `[N, H, W, 3]` uint8. Raises InputError if there is no
        decoder.
        """
        if not self.has_decoder:
            name = type(self.model).__name__
            raise InputError(f"{self.source} has no decoder ({name}): codes have no pixels")
        if codes.shape[1:] != self.grid or int(codes.max(initial=0)) >= self.num_codes:
            raise InputError(
                f"{self.source}: codes of shape {codes.shape} up to {int(codes.max(initial=0))}, "
                f"expected [N, {self.grid[0]}, {self.grid[1]}] below {self.num_codes}"
            )
        flat = torch.from_numpy(codes.astype(np.int64)).view(len(codes), -1).to(self._device)
        vectors = self.model.quantize.get_codebook_entry(flat)
        with self._whole_float32():
            pixels = self.model.decoder(self.model.post_quant_conv(vectors.to(self._dtype)))
        return self.to_uint8(pixels)

    def _whole_float32(self) -> AbstractContextManager[None]:
        """Keep float32 convolutions from rounding to 10 bits (TF32), cuDNN's default on a GPU."""
        if self._device.type != "cuda" or self._dtype != torch.float32:
            return nullcontext()
        return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)

    def to_uint8(self, pixel_values: torch.Tensor) -> np.ndarray:
        """Undo the preprocessing: pixels `[N, 3, H, W]` to images `[N, H, W, 3]` uint8."""
        pixels = pixel_values.float().cpu().permute(0, 2, 3, 1)
        if self.processor.do_normalize:
            std, mean = self.processor.image_std, self.processor.image_mean
            pixels = pixels * torch.tensor(std) + torch.tensor(mean)
        if self.processor.do_rescale:
            pixels = pixels / self.processor.rescale_factor
        return pixels.round().clamp(0, 255).to(torch.uint8).numpy()


def make_processor(image_size: int) -> ChameleonImageProcessorPil:
    """A processor to `image_size` x `image_size` pixels in -1 … 1."""
    return ChameleonImageProcessorPil(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        rescale_factor=1 / 255,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def _verify_files(folder: Path) -> None:
    """Compare the files with the folder's manifest, or with that of the model folder around it."""
    home = folder if is_complete(folder) else folder.parent
    if is_complete(home) and (home is folder or (home / LAYOUT_FILE).is_file()):
        manifest = read_manifest(home)
        for name in FILES:
            listed = (folder / name).relative_to(home).as_posix()
            if listed in manifest.files:
                verify_file(home, listed, manifest)


def _read_json(path: Path, what: str) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(
            f"{path.parent} has no {path.name}: it is not {what}; make one with "
            "`beingvl train-vq` or download one"
        )
    return read_object(path, "copy or make it again")


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / "model.safetensors"
    if not path.is_file():
        raise InputError(f"{folder} has no model.safetensors (pickles are never loaded)")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path} is damaged ({error}); copy or make it again") from error


def _load_weights(
    model: ChameleonVQVAE | JanusVQVAE, weights: Mapping[str, torch.Tensor], folder: Path
) -> None:
    """Load weights into the model; tensors that the class does not have are ignored."""
    path = folder / "model.safetensors"
    wanted = model.state_dict()
    missing = [name for name in wanted if name not in weights]
    if missing:
        raise InputError(
            f"{path} lacks {len(missing)} of {len(wanted)} weights, the first is "
            f"{missing[0]}; is config.json its own?"
        )
    for name, parameter in wanted.items():
        if weights[name].shape != parameter.shape:
            found, expected = tuple(weights[name].shape), tuple(parameter.shape)
            raise InputError(f"{path}: {name} has shape {found}, config.json says {expected}")
    model.load_state_dict({name: weights[name] for name in wanted})


def _preprocessor_file(folder: Path, given: Path | None) -> Path:
    """The folder's own file, else the given one."""
    path = folder / PREPROCESSOR_FILE
    if given and path.is_file():
        _check_same_preprocessing(path, given)
    return given if given and not path.is_file() else path


def _load_processor(path: Path, model: ChameleonVQVAE | JanusVQVAE) -> ChameleonImageProcessorPil:
    """The preprocessing in a file; a Chameleon VQ-GAN without the file uses the published one."""
    if isinstance(model, ChameleonVQVAE) and not path.is_file():
        side = model.config.resolution
        crop = {"height": side, "width": side}
        return ChameleonImageProcessorPil(size={"shortest_edge": side}, crop_size=crop)
    return _read_processor(path)


def _read_processor(path: Path) -> ChameleonImageProcessorPil:
    fields = _read_json(path, "a VQ-GAN folder with its preprocessing")
    return ChameleonImageProcessorPil.from_dict(fields)


def _check_same_preprocessing(own: Path, given: Path) -> None:
    """Raises InputError naming the first field in which the two preprocessings differ."""
    ours, theirs = (_read_processor(path).to_dict() for path in (own, given))
    for name in PREPROCESSING_FIELDS:
        if ours.get(name) != theirs.get(name):
            raise InputError(
                f"{own} says {name} {ours.get(name)}, {given} says {theirs.get(name)}; remove the "
                "one that the VQ-GAN was not trained with"
            )


def _image_size(processor: ChameleonImageProcessorPil, source: str) -> int:
    """Side of the pixels that `preprocess` returns."""
    size = processor.crop_size if processor.do_center_crop else processor.size
    height, width = size.get("height"), size.get("width")
    if not height or height != width:
        raise InputError(f"{source}: preprocessing ends in {dict(size)}, expected a square")
    return int(height)


def _grid(model: ChameleonVQVAE | JanusVQVAE, image_size: int, source: str) -> tuple[int, int]:
    factor = 2 ** (len(model.config.channel_multiplier) - 1)
    side = image_size // factor
    expected = model.config.num_patches if isinstance(model, JanusVQVAE) else side
    if image_size % factor or expected != side:
        grid = f"num_patches {expected}" if expected != side else "a whole grid"
        raise InputError(
            f"{source}: {image_size} pixels and a factor of {factor} do not give {grid}; fix "
            "crop_size"
        )
    return side, side


def _hash_what_decides_codes(
    model: ChameleonVQVAE | JanusVQVAE, processor: ChameleonImageProcessorPil
) -> str:
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.", "quantize.")):
            digest.update(f"{name} {tuple(weight.shape)}\n".encode())
            digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
    fields = processor.to_dict()
    preprocessing = {name: fields.get(name) for name in PREPROCESSING_FIELDS}
    digest.update(json.dumps(preprocessing, sort_keys=True, default=_plain).encode())
    return "sha256:" + digest.hexdigest()


def _plain(value: Any) -> Any:
    """Sizes and enumerations of the image processor as JSON."""
    return dict(value) if hasattr(value, "keys") else int(value)


def usable_device(device: str | torch.device) -> torch.device:
    """`device`; "auto" is the GPU with number LOCAL_RANK (set by launchers), else the CPU.

    Raises InputError if torch does not know the name, or if the device does not exist.
    """
    if device == "auto":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    try:
        target = torch.device(device)
        torch.empty(1, device=target).item()  # `item` fails on the device "meta"
    except (RuntimeError, AssertionError, ImportError) as error:  # it depends on torch's build
        reason = str(error).strip().partition("\n")[0][:200]
        raise InputError(
            f"device {str(device)!r} cannot be used ({reason}); give cpu, or cuda"
        ) from error
    return target
