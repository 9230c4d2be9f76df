"""train-vq: a few seconds of it already learn to reconstruct, from the seed, into a folder that
encode-images accepts.
"""

import numpy as np
import pytest
import torch
from PIL import Image

from beingvl.artefact.manifest import read_manifest, verify_folder
from beingvl.commands.main import main
from beingvl.images.train_vq import PICTURE_FILE, cluster, learning_rate_factor
from beingvl.images.vqgan import VQGAN

SMALL = (
    "--image_size=8",
    "--grid=4",
    "--num_codes=16",
    "--base_channels=32",
    "--batch_size=16",
    "--num_threads=1",
)


@pytest.fixture(scope="module")
def image_path(tmp_path_factory):
    """Forty images of two flat halves, so that codes are easy to learn."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(40):
        pixels = np.zeros((8, 8, 3), np.uint8)
        pixels[:4], pixels[4:] = rng.integers(0, 256, (2, 1, 1, 1))
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def trained(image_path, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained") / "vqgan"
    assert (
        main(
            [
                "train-vq",
                f"--image_path={image_path}",
                f"--output_path={output}",
                "--steps=80",
                *SMALL,
            ]
        )
        == 0
    )
    return output


def test_it_learns_to_reconstruct(image_path, trained):
    manifest = verify_folder(trained)
    assert manifest.counts["images"] == 36 and manifest.counts["held_out_images"] == 4
    assert (
        manifest.details["held_out_psnr_decibels"] > 15
        and manifest.counts["held_out_codes_used"] > 4
    )
    vqgan = VQGAN.load(trained)
    assert (vqgan.grid, vqgan.num_codes) == ((4, 4), 16)
    np.testing.assert_allclose(np.linalg.norm(vqgan.codebook, axis=1), 1, rtol=1e-5)
    originals = np.stack(
        [np.asarray(Image.open(image_path / f"{number}.png")) for number in range(40)]
    ).astype(float)
    decoded = vqgan.decode(
        vqgan.encode(vqgan.preprocess([image_path / f"{number}.png" for number in range(40)]))
    )
    assert np.square(originals - decoded).mean() < 0.3 * originals.var()
    assert Image.open(trained / PICTURE_FILE).size[0] == 4 * 64


def test_the_seed_decides(image_path, trained, tmp_path, capsys):
    command = ["train-vq", f"--image_path={image_path}", "--steps=80", *SMALL]
    assert main([*command, f"--output_path={tmp_path / 'same'}"]) == 0
    assert VQGAN.load(tmp_path / "same").fingerprint() == VQGAN.load(trained).fingerprint()
    assert main([*command, f"--output_path={trained}"]) == 0
    assert "reused" in capsys.readouterr().out
    assert main([*command, f"--output_path={trained}", "--seed=1"]) == 2
    assert "with different seed" in capsys.readouterr().err


def test_held_out_images_of_another_folder(image_path, tmp_path):
    (tmp_path / "held").mkdir()
    Image.new("RGB", (9, 12), "gray").save(tmp_path / "held" / "a.png")
    command = [
        "train-vq",
        f"--image_path={image_path}",
        f"--validation_path={tmp_path / 'held'}",
        "--max_images=8",
    ]
    assert main([*command, f"--output_path={tmp_path / 'vqgan'}", "--steps=2", *SMALL]) == 0
    counts = read_manifest(tmp_path / "vqgan").counts
    assert (counts["images"], counts["held_out_images"]) == (8, 1)


def test_clusters_find_the_directions_that_are_there():
    generator = torch.Generator().manual_seed(0)
    directions = torch.eye(6)
    points = directions.repeat(50, 1) + 0.05 * torch.randn(300, 6, generator=generator)
    centres = cluster(torch.nn.functional.normalize(points, dim=1), 6, generator)
    assert torch.allclose(centres.norm(dim=1), torch.ones(6), atol=1e-5)
    assert sorted((centres @ directions.T).argmax(1).tolist()) == list(range(6))
    assert (centres @ directions.T).max(1).values.min() > 0.99


def test_more_clusters_than_points():
    points = torch.nn.functional.normalize(
        torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), dim=1
    )
    centres = cluster(points, 8, torch.Generator().manual_seed(0))
    assert centres.shape == (8, 4) and torch.isfinite(centres).all()


def test_the_learning_rate_rises_and_falls():
    factors = [learning_rate_factor(step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(1 / 20) and max(factors) > 0.9 and factors[-1] < 0.001
    assert factors[20:] == sorted(factors[20:], reverse=True)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--grid=3", "expected image_size / grid to be a power of two"),
        ("--grid=16", "expected image_size / grid to be a power of two"),
        ("--base_channels=48", "expected a multiple of 32"),
        ("--num_codes=1", "expected 2 … 65536"),
        ("--steps=1", "--steps is 1, expected at least 2"),
        ("--embed_dim=1", "--embed_dim is 1, expected at least 2"),
        ("--device=gpu0", "device 'gpu0' cannot be used"),
        ("--image_path=/nowhere", "/nowhere: No such file or directory"),
    ],
)
def test_wrong_options_are_refused(image_path, tmp_path, capsys, option, message):
    command = [
        "train-vq",
        f"--image_path={image_path}",
        f"--output_path={tmp_path / 'vqgan'}",
        *SMALL,
        option,
    ]
    assert main(command) == 2
    assert message in capsys.readouterr().err


def test_one_image_is_too_few_and_a_broken_one_is_named(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.png")
    command = [
        "train-vq",
        f"--image_path={tmp_path / 'images'}",
        f"--output_path={tmp_path / 'vqgan'}",
        *SMALL,
    ]
    assert main(command) == 2
    assert "there is one image, a.png; expected at least 2" in capsys.readouterr().err
    (tmp_path / "images" / "b.png").write_text("no image")
    assert main(command) == 2
    assert "b.png cannot be read as an image" in capsys.readouterr().err
