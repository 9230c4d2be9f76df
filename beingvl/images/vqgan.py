"""The VQ-GAN: images to grids of codes and, where there is a decoder, back.

    PIL images ──preprocess──> pixels [N, 3, H, W] float32 ──encode──> codes [N, h, w] uint16
    ──decode──> [N, H, W, 3] uint8

Two transformers classes are supported, told apart by `model_type` in the folder's config.json:

    chameleon_vqgan    ChameleonVQVAE, the published being-vq-8k layout: 512 px, 32 x 32 grid,
                       8192 codes; encoder only
    janus_vqgan        JanusVQVAE, the same family with a decoder; `beingvl train-vq` makes these

Both need a stock folder: config.json, model.safetensors, preprocessor_config.json (Chameleon's
image processor: shortest edge, centre crop, rescale, mean and standard deviation).
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import ChameleonVQVAE, ChameleonVQVAEConfig, JanusVQVAE, JanusVQVAEConfig
from transformers.models.chameleon.image_processing_pil_chameleon import ChameleonImageProcessorPil

from beingvl.artefact.files import write_atomically
from beingvl.artefact.manifest import Manifest, start_folder, write_manifest
from beingvl.errors import InputError

CLASSES = {
    "chameleon_vqgan": (ChameleonVQVAE, ChameleonVQVAEConfig),
    "janus_vqgan": (JanusVQVAE, JanusVQVAEConfig),
}
PREPROCESSING_FIELDS = (
    "do_convert_rgb",
    "do_resize",
    "size",
    "resample",
    "do_center_crop",
    "crop_size",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
)
FILES = ("config.json", "model.safetensors", "preprocessor_config.json")  # of a stock folder
MAX_CODES = 1 << 16
MAX_PIXELS = (
    50_000_000  # decoded at once: 150 MB, and a few copies of it while the image is resized
)
MAX_ASPECT = (
    100  # a line one pixel high would become wider than any memory when its short edge is resized
)
UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)
"""What Pillow raises for damaged files, depending on the format."""


class VQGAN:
    """A VQ-GAN and its preprocessing. `dtype` is the encoder's and decoder's; codes are always
    looked up in float32.
    """

    def __init__(
        self,
        model: ChameleonVQVAE | JanusVQVAE,
        processor: ChameleonImageProcessorPil,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        source: str = "VQ-GAN",
    ) -> None:
        self.source = source
        self.processor = processor
        self.image_size = _image_size(processor, source)
        self.grid = _grid(model, self.image_size, source)
        if model.config.num_embeddings > MAX_CODES:
            raise InputError(
                f"{source} has {model.config.num_embeddings} codes, expected at most "
                f"{MAX_CODES} (16 bits)"
            )
        self._fingerprint = _hash_what_decides_codes(model, processor)
        self._device, self._dtype = torch.device(device), dtype
        codebook = (
            model.quantize.embedding.weight.detach().float().clone()
        )  # or 16 bits would round it
        self.model = model.eval().requires_grad_(False).to(device=device, dtype=dtype)
        self.model.quantize.float()
        self.model.quantize.embedding.weight.data.copy_(codebook)

    @classmethod
    def load(
        cls,
        folder: Path | str,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> VQGAN:
        """Read a stock folder, made by `beingvl train-vq` or published. Raises InputError naming
        what is wrong with it.
        """
        folder = Path(folder)
        fields = _read_json(folder / "config.json", "a VQ-GAN folder")
        if fields.get("model_type") not in CLASSES:
            found, expected = fields.get("model_type"), " or ".join(CLASSES)
            raise InputError(
                f"{folder / 'config.json'}: model_type is {found!r}, expected {expected}"
            )
        model_class, config_class = CLASSES[fields["model_type"]]
        try:
            model = model_class(config_class.from_dict(fields))
        except (TypeError, ValueError, StrictDataclassError) as error:
            raise InputError(
                f"{folder / 'config.json'} is not usable ({' '.join(str(error).split())})"
            ) from error
        _load_weights(model, folder)
        processor = _load_processor(folder, model)
        return cls(model, processor, device, dtype, str(folder))

    def save(
        self,
        folder: Path | str,
        counts: Mapping[str, int | float] | None = None,
        details: Mapping[str, Any] | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> Manifest:
        """Write a stock folder and its manifest; `counts` and `details` go into the manifest,
        `files` beside the weights.
        """
        assert self._dtype == torch.float32, (
            "a VQ-GAN loaded in another dtype has lost the bits it would save"
        )
        folder = start_folder(folder, "vqgan")
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        for name, data in (files or {}).items():
            write_atomically(folder / name, data)
        # Somebody's files that lie there are never listed, nor removed.
        written = {*FILES, *(files or {})}
        details = {**self.sizes(), **(details or {})}
        lineage = {"vqgan": self._fingerprint}
        return write_manifest(
            folder, "vqgan", counts or {}, lineage, details, belongs=written.__contains__
        )

    def sizes(self) -> dict[str, Any]:
        """What a manifest says of the VQ-GAN."""
        return {
            "num_codes": self.num_codes,
            "grid": list(self.grid),
            "image_size": self.image_size,
        }

    def fingerprint(self) -> str:
        """Hash of all that decides codes: encoder, code book, preprocessing. Equal fingerprints,
        equal codes.

        The decoder is left out: one more, one less or another does not make existing codes wrong.
        """
        return self._fingerprint

    @property
    def dtype(self) -> str:
        """Of the encoder, such as "bfloat16"."""
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

    def preprocess(self, images: Sequence[Image.Image | Path | str]) -> torch.Tensor:
        """Images to pixels `[N, 3, H, W]` float32; transparency becomes white. Raises InputError
        for an unreadable image.
        """
        pixels = [
            to_pixels(
                self.processor, image if isinstance(image, Image.Image) else read_image(image)
            )
            for image in images
        ]
        return (
            torch.stack(pixels) if pixels else torch.empty(0, 3, self.image_size, self.image_size)
        )

    @torch.inference_mode()
    def encode(self, pixel_values: torch.Tensor) -> np.ndarray:
        """Pixels `[N, 3, H, W]` to codes `[N, h, w]` uint16."""
        side = self.image_size
        if tuple(pixel_values.shape[1:]) != (3, side, side):
            raise InputError(
                f"{self.source}: pixels have shape {list(pixel_values.shape)}, expected [N, 3, "
                f"{side}, {side}]"
            )
        pixels = pixel_values.to(device=self._device, dtype=self._dtype)
        with self._whole_float32():
            latents = self.model.quant_conv(self.model.encoder(pixels))
        _, _, indices = self.model.quantize(latents.float())
        return indices.view(-1, *self.grid).cpu().numpy().astype(np.uint16)

    @torch.inference_mode()
    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Codes `[N, h, w]` to images `[N, H, W, 3]` uint8. Raises InputError without a decoder."""
        if not self.has_decoder:
            raise InputError(
                f"{self.source} has no decoder ({type(self.model).__name__}): codes cannot be "
                "turned into pixels"
            )
        if codes.shape[1:] != self.grid or int(codes.max(initial=0)) >= self.num_codes:
            found = f"codes of shape {codes.shape} up to {int(codes.max(initial=0))}"
            raise InputError(
                f"{self.source}: {found}, expected [N, {self.grid[0]}, {self.grid[1]}] below "
                f"{self.num_codes}"
            )
        flat = torch.from_numpy(codes.astype(np.int64)).view(len(codes), -1).to(self._device)
        vectors = self.model.quantize.get_codebook_entry(flat)
        with self._whole_float32():
            pixels = self.model.decoder(self.model.post_quant_conv(vectors.to(self._dtype)))
        return self.to_uint8(pixels)

    def _whole_float32(self) -> AbstractContextManager[None]:
        """In float32 a GPU's convolutions must not round to 10 bits (TF32), which torch lets
        cuDNN do by default.
        """
        if self._device.type != "cuda" or self._dtype != torch.float32:
            return nullcontext()
        return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)

    def to_uint8(self, pixel_values: torch.Tensor) -> np.ndarray:
        """Undo rescaling and normalisation: pixels `[N, 3, H, W]` to images `[N, H, W, 3]`
        uint8.
        """
        pixels = pixel_values.float().cpu().permute(0, 2, 3, 1)
        if self.processor.do_normalize:
            pixels = pixels * torch.tensor(self.processor.image_std) + torch.tensor(
                self.processor.image_mean
            )
        if self.processor.do_rescale:
            pixels = pixels / self.processor.rescale_factor
        return pixels.round().clamp(0, 255).to(torch.uint8).numpy()


def read_image(path: Path | str) -> Image.Image:
    """Open and decode an image file. Raises InputError when it is missing, damaged or not an
    image.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    return decode_image(data, path)


def decode_image(data: bytes, name: Path | str) -> Image.Image:
    """The bytes of an image file, decoded. Raises InputError, with `name` in it, when they are
    damaged, no image, or too large.

    A JPEG file of more than MAX_PIXELS is decoded at 1/2, 1/4 or 1/8 of its size, which never makes
    it whole in memory.
    """
    try:
        with warnings.catch_warnings():  # MAX_PIXELS says it better
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
        too_large = _bound_size(image)
        if not too_large:
            image.load()
    except UNREADABLE as error:
        reason = (
            "it is in no known format"
            if isinstance(error, UnidentifiedImageError)
            else f"{type(error).__name__}: {error}"
        )
        raise InputError(f"{name} cannot be read as an image ({reason})") from error
    if too_large:
        raise InputError(f"{name} has {image.width} x {image.height} pixels, {too_large}")
    _refuse_deep_pixels(image, name)
    return image


def _refuse_deep_pixels(image: Image.Image, name: Path | str) -> None:
    """Raises InputError for what RGB would cut off: 16 bits a pixel would become white,
    fractions of 1 black.
    """
    if image.mode[0] not in "IF":
        return
    extrema: Any = image.getextrema()  # of one band
    low, high = extrema
    if image.mode == "F" or low < 0 or high > 255:
        raise InputError(
            f"{name} has one value a pixel, from {low:g} to {high:g}, expected 8 bits; convert it"
        )


def as_array(image: Image.Image) -> np.ndarray:
    """A picture `[H, W, 3]` uint8."""
    return np.asarray(image.convert("RGB"))


def _bound_size(image: Image.Image) -> str:
    """Before it is decoded: reduce a large JPEG; what is wrong with the size of anything else,
    or nothing.
    """
    width, height = image.size
    if max(width, height) > MAX_ASPECT * min(width, height):
        return (
            f"expected at most {MAX_ASPECT} times as many along one side as along the other; cut it"
        )
    if width * height <= MAX_PIXELS:
        return ""
    factor = next(
        (factor for factor in (2, 4, 8) if width * height / factor**2 <= MAX_PIXELS), None
    )
    if image.format not in ("JPEG", "MPO") or factor is None:  # MPO: JPEG files of some cameras
        return f"expected at most {MAX_PIXELS:,} in all (a JPEG file may have more); shrink it"
    image.draft(None, (width // factor, height // factor))
    return ""


def to_pixels(processor: ChameleonImageProcessorPil, image: Image.Image) -> torch.Tensor:
    """One image to pixels `[3, H, W]` float32."""
    return processor(image, return_tensors="pt")["pixel_values"][0].float()


def make_processor(image_size: int) -> ChameleonImageProcessorPil:
    """Preprocessing to `image_size` x `image_size` pixels in -1 … 1."""
    return ChameleonImageProcessorPil(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        rescale_factor=1 / 255,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def _read_json(path: Path, what: str) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(
            f"{path.parent} has no {path.name}: it is not {what}; make one with `beingvl "
            "train-vq` or download one"
        )
    try:
        fields = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(fields, dict):
        raise InputError(f"{path}: found {type(fields).__name__}, expected an object")
    return fields


def _load_weights(model: ChameleonVQVAE | JanusVQVAE, folder: Path) -> None:
    """Fill the model from model.safetensors; a decoder or discriminator that the class lacks is
    left in the file.
    """
    path = folder / "model.safetensors"
    if not path.is_file():
        raise InputError(
            f"{folder} has no model.safetensors (the only weight format read here: pickles "
            "are never loaded)"
        )
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path} is damaged ({error}); copy or make it again") from error
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


def _load_processor(folder: Path, model: ChameleonVQVAE | JanusVQVAE) -> ChameleonImageProcessorPil:
    """The folder's preprocessing; Chameleon's published one, at the model's resolution, where a
    Chameleon folder has none.
    """
    path = folder / "preprocessor_config.json"
    if isinstance(model, ChameleonVQVAE) and not path.is_file():
        side = model.config.resolution
        return ChameleonImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        )
    fields = _read_json(path, "a VQ-GAN folder with its preprocessing")
    return ChameleonImageProcessorPil.from_dict(fields)


def _image_size(processor: ChameleonImageProcessorPil, source: str) -> int:
    """Side in pixels of what `preprocess` returns."""
    size = processor.crop_size if processor.do_center_crop else processor.size
    height, width = size.get("height"), size.get("width")
    if not height or height != width:
        raise InputError(
            f"{source}: preprocessing ends in {dict(size)}, expected a square height and width"
        )
    return int(height)


def _grid(model: ChameleonVQVAE | JanusVQVAE, image_size: int, source: str) -> tuple[int, int]:
    factor = 2 ** (len(model.config.channel_multiplier) - 1)
    side = image_size // factor
    if image_size % factor or (isinstance(model, JanusVQVAE) and model.config.num_patches != side):
        expected = (
            f"num_patches {model.config.num_patches}"
            if isinstance(model, JanusVQVAE)
            else "a whole grid"
        )
        raise InputError(
            f"{source}: {image_size} pixels and a factor of {factor} do not give "
            f"{expected}; fix crop_size"
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
    """Raises InputError for a name that torch does not know, an accelerator that is not there,
    or one that computes nothing.
    """
    try:
        target = torch.device(device)
        torch.empty(1, device=target).item()  # the device "meta" has no values to give
    except (
        RuntimeError,
        AssertionError,
        ImportError,
    ) as error:  # torch's own builds differ in which they raise
        reason = str(error).strip().partition("\n")[0][:200]
        raise InputError(
            f"device {str(device)!r} cannot be used ({reason}); give cpu, or cuda where "
            "there is an accelerator"
        ) from error
    return target
