"""The vBPE page: what it measures is right, it is self-contained, and its pictures show the
tokens.
"""

from __future__ import annotations

import argparse
import re

import numpy as np
import pytest
from PIL import Image

from beingvl.errors import InputError
from beingvl.report import vbpe as report_vbpe
from beingvl.vbpe.published import LegacyVisualBPE
from beingvl.vbpe.reference import TokenGrid, train_reference
from beingvl.vbpe.visual_bpe import VisualBPE
from tests.images.test_vqgan import make_images, make_janus


def report(*options: object) -> None:
    parser = argparse.ArgumentParser()
    report_vbpe.add_arguments(parser)
    report_vbpe.run(parser.parse_args(list(map(str, options))))


@pytest.fixture(scope="module")
def vq():
    return make_janus()


@pytest.fixture
def codes(vq, tmp_path) -> np.ndarray:
    codes = vq.encode(vq.preprocess(make_images(12)))
    codes[:, 2:6, 2:7] = 3
    np.save(tmp_path / "codes.npy", codes)
    return codes


@pytest.fixture
def vbpe(codes, tmp_path) -> VisualBPE:
    vbpe = VisualBPE(16, train_reference(list(codes), 16, 40)[0])
    vbpe.save(tmp_path / "vbpe.json")
    return vbpe


def test_measurements_equal_a_recount(vbpe, codes, tmp_path):
    sample = report_vbpe.measure(vbpe, [tmp_path / "codes.npy"], 2000, 0)
    grids = [TokenGrid(grid) for grid in codes]
    lengths = [codes.size]
    for rank, merge in enumerate(vbpe.merges.tolist()):
        for grid in grids:
            grid.apply(tuple(merge), 16 + rank)
        lengths.append(sum(len(grid.ids) for grid in grids))
    assert report_vbpe.tokens_by_merges(sample).tolist() == pytest.approx(
        [length / len(codes) for length in lengths]
    )
    assert (
        sample.used.tolist()
        == np.bincount([i for grid in grids for i in grid.stream()], minlength=56).tolist()
    )
    for image, grid in enumerate(grids):
        owner = report_vbpe.owners(vbpe, sample.stream(image), 8, 8)
        anchors = sorted(grid.ids)
        assert {(y, x): anchors[owner[y, x]] for y in range(8) for x in range(8)} == grid.owner
    assert sum(report_vbpe.count_shapes(vbpe).values()) == 40
    assert len(report_vbpe.measure(vbpe, [tmp_path / "codes.npy"], 5, 0).grids) == 5


@pytest.mark.parametrize("given", ["nothing", "codes", "vq", "codes and vq"])
def test_page_is_self_contained_and_pictures_exist(vbpe, vq, tmp_path, given):
    options: list[object] = [tmp_path / "vbpe.json"]
    if "codes" in given:
        options += ["--codes", tmp_path / "codes.npy"]
    if "vq" in given:
        vq.save(tmp_path / "vq")
        options += ["--vq", tmp_path / "vq"]
    report(*options)
    folder = tmp_path / "vbpe_report"
    text = (folder / "report.html").read_text()
    assert not re.search(r"<script|<link|(src|href)\s*=\s*['\"](?!data:|#)", text)
    files = {path.stem.split("-")[0] for path in folder.glob("*.png")}
    assert files == {"largest", "shape", "sizes"} | (
        {"used", "example", "compression"} if "codes" in given else set()
    )
    for path in folder.glob("*.png"):
        assert Image.open(path).convert("RGB").getextrema() != ((255, 255),) * 3  # not blank
    assert text.count("<figure>") == 24 + len(report_vbpe.count_shapes(vbpe).most_common(24)) + (
        24 + 3 if "codes" in given else 0
    )


def test_the_legend_of_the_sizes_lies_above_the_bars(vbpe, tmp_path):
    figure = report_vbpe.draw_charts(
        vbpe, report_vbpe.measure(vbpe, [tmp_path / "codes.npy"], 2000, 0)
    )["sizes"]
    figure.draw_without_rendering()
    [axes] = figure.axes
    assert (
        axes.bbox.y1 <= axes.get_legend().get_window_extent().y0
        and axes.get_legend().get_window_extent().y1 <= figure.bbox.y1
    )


def test_borders_lie_between_tokens(vbpe, tmp_path):
    sample = report_vbpe.measure(vbpe, [tmp_path / "codes.npy"], 2000, 0)
    picture = np.asarray(report_vbpe.draw_example(vbpe, sample, 0, None).convert("RGB")).astype(int)
    side = picture.shape[0] // 8
    owner = report_vbpe.owners(vbpe, sample.stream(0), 8, 8)
    for y in range(8):
        for x in range(1, 8):
            line = picture[y * side + side // 2, x * side]
            inside = picture[y * side + side // 2, x * side + side // 2]
            assert (owner[y, x] == owner[y, x - 1]) == (line.tolist() == inside.tolist())


def test_pixels_of_a_token_come_from_an_image_that_has_it(vbpe, vq, tmp_path):
    sample = report_vbpe.measure(vbpe, [tmp_path / "codes.npy"], 2000, 0)
    for image_id in np.flatnonzero(sample.used)[-10:].tolist():
        grid, top, left = report_vbpe._context(vbpe, image_id, sample, vq.grid)
        dy, dx, code = vbpe.cells(image_id)
        assert grid[top + dy, left + dx].tolist() == code.tolist()
    grid, top, left = report_vbpe._context(vbpe, vbpe.num_ids - 1, None, vq.grid)
    dy, dx, code = vbpe.cells(vbpe.num_ids - 1)
    assert grid[top + dy, left + dx].tolist() == code.tolist()


def test_wrong_input_is_refused(vbpe, vq, tmp_path):
    LegacyVisualBPE(16, []).save(tmp_path / "legacy.json")
    with pytest.raises(InputError, match="tokens have no fixed shape to show"):
        report(tmp_path / "legacy.json")
    with pytest.raises(InputError, match="--max_images is 0"):
        report(tmp_path / "vbpe.json", "--codes", tmp_path / "codes.npy", "--max_images", 0)
    np.save(tmp_path / "other.npy", np.zeros((2, 3, 3), np.uint8))
    with pytest.raises(InputError, match="grids of several sizes"):
        report(tmp_path / "vbpe.json", "--codes", tmp_path / "codes.npy", tmp_path / "other.npy")
    np.save(tmp_path / "other.npy", np.full((2, 3, 3), 16))
    with pytest.raises(InputError, match="codes 16 … 16, expected 0 … 15"):
        report(tmp_path / "vbpe.json", "--codes", tmp_path / "other.npy")
    vq.save(tmp_path / "vq")
    VisualBPE(16, vbpe.merges, {"vqgan": "sha256:another"}).save(tmp_path / "vbpe.json")
    with pytest.raises(InputError, match="do not match: they were made with different vqgan"):
        report(tmp_path / "vbpe.json", "--vq", tmp_path / "vq")


def test_a_vqgan_without_decoder_is_refused(vbpe, tmp_path):
    import torch
    from transformers import ChameleonVQVAE, ChameleonVQVAEConfig

    from tests.images.test_vqgan import SIZES

    torch.manual_seed(0)
    ChameleonVQVAE(ChameleonVQVAEConfig(**SIZES, resolution=32)).save_pretrained(
        tmp_path / "chameleon"
    )
    with pytest.raises(InputError, match="has no decoder, so it cannot show pixels"):
        report(tmp_path / "vbpe.json", "--vq", tmp_path / "chameleon")
