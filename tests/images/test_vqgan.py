"""VQGAN: the same codes as transformers' own classes, fingerprints that follow what decides
codes, wrong input.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    ChameleonVQVAE,
    ChameleonVQVAEConfig,
    JanusVQVAE,
    JanusVQVAEConfig,
)

from beingvl.artefact.manifest import read_manifest, verify_folder
from beingvl.errors import InputError
from beingvl.images import decode
from beingvl.images.decode import read_image
from beingvl.images.preprocess import Preprocess
from beingvl.images.vqgan import VQGAN, make_processor
from tests.damage import list_anew
from tests.programs import run_program
from tests.upstream.artefacts import preprocessor_fields

SIZES = {
    "embed_dim": 4,
    "num_embeddings": 16,
    "latent_channels": 8,
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
}


def make_janus(seed: int = 0, **changed: int) -> VQGAN:
    """A JanusVQVAE with random weights, 16 px, 8 x 8 grid, 16 codes; code vectors of length 1,
    which it assumes in decode.
    """
    torch.manual_seed(seed)
    model = JanusVQVAE(JanusVQVAEConfig(**{**SIZES, "num_patches": 8, **changed}))
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.reset_parameters()
    weight = model.quantize.embedding.weight
    weight.data.copy_(torch.nn.functional.normalize(torch.randn(weight.shape), dim=1))
    return VQGAN(model, make_processor(16))


def make_images(count: int, seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(count)
    ]


@pytest.fixture(scope="module")
def janus() -> VQGAN:
    return make_janus()


@pytest.fixture
def folder(janus: VQGAN, tmp_path):
    janus.save(tmp_path / "vqgan")
    return tmp_path / "vqgan"


@pytest.fixture
def chameleon_folder(tmp_path):
    """The published layout: config.json and model.safetensors of a ChameleonVQVAE, nothing else."""
    torch.manual_seed(0)
    model = ChameleonVQVAE(ChameleonVQVAEConfig(**SIZES, resolution=32))
    model.save_pretrained(tmp_path / "chameleon")
    return tmp_path / "chameleon"


def test_saved_and_loaded_is_the_same(janus, folder):
    loaded = VQGAN.load(folder)
    pixels = janus.preprocess(make_images(5))
    assert loaded.fingerprint() == janus.fingerprint()
    assert (loaded.num_codes, loaded.grid, loaded.image_size) == (16, (8, 8), 16)
    np.testing.assert_array_equal(loaded.codebook, janus.codebook)
    np.testing.assert_array_equal(loaded.encode(pixels), janus.encode(pixels))
    manifest = verify_folder(folder)
    assert manifest.kind == "vqgan" and manifest.lineage == {"vqgan": janus.fingerprint()}
    assert manifest.details == {"num_codes": 16, "grid": [8, 8], "image_size": 16}


def test_a_copied_and_saved_again_folder_has_the_same_fingerprint(janus, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "elsewhere")
    loaded = VQGAN.load(tmp_path / "elsewhere", dtype=torch.bfloat16)
    assert loaded.fingerprint() == janus.fingerprint()
    VQGAN.load(folder).save(tmp_path / "again")
    assert read_manifest(tmp_path / "again").content_hash == read_manifest(folder).content_hash
    with pytest.raises(AssertionError):
        loaded.save(tmp_path / "lossy")


def test_files_that_somebody_put_there_are_not_the_vqgans(janus, folder):
    (folder / "notes.txt").write_text("mine")
    janus.save(folder, files={"reconstructions.png": b"picture"})
    stock = {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert set(verify_folder(folder).files) == {*stock, "reconstructions.png"}
    janus.save(folder)
    assert set(verify_folder(folder).files) == stock
    assert {path.name for path in folder.iterdir()} == {*stock, "notes.txt", "manifest.json"}


@pytest.mark.parametrize(
    "name", ["encoder.conv_in.weight", "quant_conv.bias", "quantize.embedding.weight"]
)
def test_the_fingerprint_follows_each_weight_that_decides_codes(janus, folder, name):
    weights = load_file(folder / "model.safetensors")
    weights[name].view(-1)[0] += 1e-6
    save_file(weights, folder / "model.safetensors")
    list_anew(folder)
    assert VQGAN.load(folder).fingerprint() != janus.fingerprint()


def test_the_fingerprint_follows_preprocessing_but_not_the_decoder(janus, folder):
    weights = load_file(folder / "model.safetensors")
    weights["decoder.conv_out.bias"] += 1.0
    save_file(weights, folder / "model.safetensors")
    list_anew(folder)
    assert VQGAN.load(folder).fingerprint() == janus.fingerprint()
    edit(folder / "preprocessor_config.json", image_mean=[0.5, 0.5, 0.4])
    list_anew(folder)
    assert VQGAN.load(folder).fingerprint() != janus.fingerprint()


def test_codes_and_pixels_are_those_of_transformers(janus):
    pixels = janus.preprocess(make_images(3))
    codes = janus.encode(pixels)
    assert codes.shape == (3, 8, 8) and codes.dtype == np.uint16 and len(np.unique(codes)) > 4
    with torch.inference_mode():
        expected = janus.model.encode(pixels).image_tokens.view(3, 8, 8)
        decoded = janus.model.decode(expected.view(3, 64))
    np.testing.assert_array_equal(codes, expected.numpy())
    images = janus.decode(codes)
    assert images.shape == (3, 16, 16, 3) and images.dtype == np.uint8
    by_hand = (
        ((decoded.permute(0, 2, 3, 1) * 0.5 + 0.5) * 255).round().clamp(0, 255).to(torch.uint8)
    )
    assert np.abs(images.astype(int) - by_hand.numpy()).max() <= 1


def test_the_codes_are_the_nearest_code_vectors(janus):
    pixels = janus.preprocess(make_images(2))
    with torch.inference_mode():
        latents = (
            janus.model.quant_conv(janus.model.encoder(pixels))
            .permute(0, 2, 3, 1)
            .numpy()
            .astype(np.float64)
        )
    distances = np.linalg.norm(latents[..., None, :] - janus.codebook.astype(np.float64), axis=-1)
    chosen = np.take_along_axis(distances, janus.encode(pixels)[..., None].astype(int), axis=-1)[
        ..., 0
    ]
    assert (chosen - distances.min(-1)).max() < 1e-5


@pytest.mark.parametrize("size", [(700, 531), (531, 700), (300, 200), (512, 512), (1025, 513)])
def test_preprocessing_is_the_published_one(chameleon_folder, tmp_path, size):
    """To the bit: transformers' processor of the same configuration, and the published steps
    done by hand.
    """
    (chameleon_folder / "preprocessor_config.json").write_text(json.dumps(preprocessor_fields(512)))
    noise = np.random.default_rng(0).integers(
        0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8
    )
    image = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
    image.save(tmp_path / "image.png")
    found = VQGAN.load(chameleon_folder).preprocess([tmp_path / "image.png"])[0].numpy()
    theirs = AutoImageProcessor.from_pretrained(chameleon_folder, use_fast=False)(
        image, return_tensors="np"
    )["pixel_values"][0]
    np.testing.assert_array_equal(found, theirs)
    scale = 512 / min(size)
    width, height = (512 if edge == min(size) else int(edge * scale) for edge in size)
    left, top = (width - 512) // 2, (height - 512) // 2
    cropped = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))[
        top : top + 512, left : left + 512
    ]
    by_hand = ((cropped.astype(np.float64) * 0.0078).astype(np.float32) - np.float32(1)).transpose(
        2, 0, 1
    )
    np.testing.assert_array_equal(found, by_hand)


@pytest.mark.parametrize("num_together", [1, 3, 7])
def test_codes_do_not_depend_on_the_batch(janus, num_together):
    pixels = janus.preprocess(make_images(21))
    parts = [janus.encode(part) for part in pixels.split(num_together)]
    np.testing.assert_array_equal(np.concatenate(parts), janus.encode(pixels))


def test_the_published_layout_loads_without_a_decoder(chameleon_folder):
    vqgan = VQGAN.load(chameleon_folder)
    assert (vqgan.num_codes, vqgan.grid, vqgan.image_size, vqgan.has_decoder) == (
        16,
        (16, 16),
        32,
        False,
    )
    pixels = vqgan.preprocess(make_images(2))
    white = vqgan.preprocess([Image.new("RGB", (40, 40), "white")])
    assert white.min() == white.max() == pytest.approx(255 * 0.0078 - 1)
    with torch.inference_mode():
        expected = vqgan.model.encode(pixels).image_tokens.view(2, 16, 16)
    np.testing.assert_array_equal(vqgan.encode(pixels), expected.numpy())
    with pytest.raises(InputError, match="has no decoder"):
        vqgan.decode(vqgan.encode(pixels))


def test_weights_that_the_class_lacks_are_left_in_the_file(chameleon_folder):
    weights = load_file(chameleon_folder / "model.safetensors")
    before = VQGAN.load(chameleon_folder).fingerprint()
    save_file(
        {**weights, "decoder.conv_in.weight": torch.zeros(3)},
        chameleon_folder / "model.safetensors",
    )
    assert VQGAN.load(chameleon_folder).fingerprint() == before


# ---- preprocessing ----


def test_preprocessing_resizes_the_shortest_edge_and_crops_the_centre(janus):
    stripes = Image.new("RGB", (96, 32), "red")
    stripes.paste("blue", (32, 0, 64, 32))
    image = janus.to_uint8(janus.preprocess([stripes]))[0]
    assert image.shape == (16, 16, 3)
    assert (image[:, 4:12] == [0, 0, 255]).all()


def test_pixels_of_the_right_size_come_back_exactly(janus):
    images = make_images(4)
    np.testing.assert_array_equal(
        janus.to_uint8(janus.preprocess(images)), np.stack([np.asarray(image) for image in images])
    )


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "I;16", "F"])
@pytest.mark.parametrize("size", [(16, 16), (1, 1), (300, 2)])
def test_every_kind_of_image_becomes_pixels(janus, mode, size):
    pixels = janus.preprocess([Image.new(mode, size)])
    assert pixels.shape == (1, 3, 16, 16) and pixels.dtype == torch.float32
    assert -1.001 <= pixels.min() <= pixels.max() <= 1.001


@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_an_orientation_in_exif_is_applied_as_viewers_do_or_ignored(tmp_path, orientation):
    note, image = Image.Exif(), make_images(1)[0].resize((48, 16))
    note[0x112] = orientation
    for suffix in ("png", "webp", "jpg"):
        options = {"lossless": True} if suffix == "webp" else {}
        image.save(tmp_path / f"a.{suffix}", exif=note, **options)
        stored = Image.open(tmp_path / f"a.{suffix}")
        viewed = decode.upright(read_image(tmp_path / f"a.{suffix}"))
        assert viewed.tobytes() == ImageOps.exif_transpose(stored).tobytes()
        assert decode.upright(viewed).tobytes() == viewed.tobytes()  # once
    path = tmp_path / "a.png"
    viewed = ImageOps.exif_transpose(Image.open(path))
    for exif, expected in (("apply", viewed), ("ignore", image)):
        cropped = Preprocess(make_processor(16), exif).crop
        for picture in (Image.open(path), read_image(path)):
            assert (cropped(picture, "a") == cropped(expected, "b")).all()


def test_transparency_becomes_white(janus):
    assert janus.preprocess([Image.new("RGBA", (16, 16), (9, 9, 9, 0))]).min() == 1


def test_paths_and_images_give_the_same_pixels(janus, tmp_path):
    image = make_images(1)[0]
    image.save(tmp_path / "a.png")
    assert torch.equal(
        janus.preprocess([tmp_path / "a.png", str(tmp_path / "a.png")])[1],
        janus.preprocess([image])[0],
    )
    assert janus.preprocess([]).shape == (0, 3, 16, 16)


# ---- wrong input ----


def edit(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


WRONG_FOLDERS = {
    "config.json: it is not": lambda folder: (folder / "config.json").unlink(),
    "not valid JSON": lambda folder: (folder / "config.json").write_text("{"),
    "holds list, expected a JSON object": lambda folder: (folder / "config.json").write_text("[]"),
    "model_type is 'llama'": lambda folder: edit(folder / "config.json", model_type="llama"),
    "config.json is not usable": lambda folder: edit(folder / "config.json", num_embeddings="many"),
    "has no model.safetensors": lambda folder: (folder / "model.safetensors").unlink(),
    "is damaged": lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 100),
    "lacks 1 of": lambda folder: edit_weights(
        folder, lambda weights: weights.pop("quant_conv.bias")
    ),
    "quant_conv.bias has shape": lambda folder: edit_weights(
        folder, lambda weights: weights.update({"quant_conv.bias": torch.zeros(5)})
    ),
    "has no preprocessor_config.json": lambda folder: (
        folder / "preprocessor_config.json"
    ).unlink(),
    "expected a square": lambda folder: edit(
        folder / "preprocessor_config.json", crop_size={"height": 16, "width": 32}
    ),
    "do not give num_patches 8": lambda folder: edit(
        folder / "preprocessor_config.json", crop_size={"height": 32, "width": 32}
    ),
}


@pytest.mark.parametrize("message", WRONG_FOLDERS)
def test_a_wrong_folder_is_refused(folder, message):
    WRONG_FOLDERS[message](folder)
    list_anew(folder)
    with pytest.raises(InputError, match=message):
        VQGAN.load(folder)


def test_more_codes_than_sixteen_bits_are_refused():
    with pytest.raises(InputError, match="has 65537 codes, expected at most 65536"):
        make_janus(num_embeddings=65537)


def test_pixels_of_another_size_are_refused(janus):
    with pytest.raises(InputError, match=r"expected \[N, 3, 16, 16\]"):
        janus.encode(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize(
    "codes", [np.zeros((1, 4, 4), np.uint16), np.full((1, 8, 8), 16, np.uint16)]
)
def test_codes_of_another_vqgan_are_refused(janus, codes):
    with pytest.raises(InputError, match=r"expected \[N, 8, 8\] below 16"):
        janus.decode(codes)


@pytest.mark.parametrize("damage", ["missing", "text", "empty", "cut", "folder"])
@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "bmp", "tiff"])
def test_an_unreadable_image_is_named(tmp_path, damage, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.effect_noise((64, 64), 50).convert("RGB").save(path)
    assert read_image(path).size == (64, 64)
    data = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes({"text": b"no image", "empty": b"", "cut": data[: len(data) // 2]}[damage])
    with pytest.raises(InputError, match=path.name):
        read_image(path)


# ---- size ----


def save_ramp(path, side, **options):
    """A picture that becomes brighter from left to right."""
    Image.fromarray(np.tile(np.linspace(0, 255, side).astype(np.uint8), (side, 1))).save(
        path, **options
    )
    return path


def test_a_large_jpeg_is_decoded_smaller_and_other_formats_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "MAX_PIXELS", 32 * 32)
    small = np.asarray(read_image(save_ramp(tmp_path / "a.jpg", 32)))
    for side in (64, 100, 128, 250):
        image = read_image(save_ramp(tmp_path / f"{side}.jpg", side))
        assert 16 * 16 < image.width * image.height <= 32 * 32
        assert abs(np.asarray(image.resize((32, 32))).astype(int) - small).max() < 12
    Image.open(tmp_path / "64.jpg").save(
        tmp_path / "two.mpo", save_all=True, append_images=[Image.new("L", (64, 64))]
    )
    assert read_image(tmp_path / "two.mpo").size == (32, 32)
    with pytest.raises(InputError, match="has 300 x 300 pixels, expected at most 1,024 in all"):
        read_image(save_ramp(tmp_path / "b.jpg", 300))
    with pytest.raises(InputError, match="has 33 x 33 pixels"):
        read_image(save_ramp(tmp_path / "a.png", 33))
    assert read_image(save_ramp(tmp_path / "c.png", 32)).size == (32, 32)


@pytest.mark.parametrize(
    ("pixels", "suffix", "found"),
    [
        (np.full((9, 9), 40000, np.uint16), "png", "40000 to 40000"),
        (np.full((9, 9), -3, np.int32), "tiff", "-3 to -3"),
        (np.full((9, 9), 0.5, np.float32), "tiff", "0.5 to 0.5"),
    ],
)
def test_pixels_that_rgb_would_make_white_or_black_are_refused(tmp_path, pixels, suffix, found):
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}")
    with pytest.raises(InputError, match=f"one value per pixel, from {found}, expected 8 bits"):
        read_image(tmp_path / f"a.{suffix}")
    Image.fromarray(np.full((9, 9), 200, np.uint16)).save(tmp_path / "b.png")
    assert decode.as_array(read_image(tmp_path / "b.png")).min() == 200


def test_a_line_is_refused(tmp_path):
    Image.new("L", (303, 3)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="expected one side at most 100 times the other"):
        read_image(tmp_path / "a.png")


@pytest.mark.slow
def test_a_hundred_megapixels_take_bounded_memory(tmp_path):
    """A JPEG file is read with less memory than its pixels would take, a PNG file is refused
    before it is decoded.
    """
    picture = Image.new("L", (10000, 10000), 128)
    for name, printed, megabytes in [
        ("a.jpg", "(3, 512, 512)", 300),
        ("a.png", "has 10000 x 10000 pixels", 20),
    ]:
        picture.save(tmp_path / name)
        out = run_program("memory_of_read", tmp_path / name, is_measured=True).stdout
        assert printed in out and float(out.splitlines()[-1]) < megabytes, out


def test_the_code_book_stays_float32_beside_a_16_bit_encoder(folder) -> None:
    exact, low = VQGAN.load(folder), VQGAN.load(folder, dtype=torch.bfloat16)
    np.testing.assert_array_equal(low.codebook, exact.codebook)
    assert low.fingerprint() == exact.fingerprint()
    assert next(low.model.encoder.parameters()).dtype == torch.bfloat16
