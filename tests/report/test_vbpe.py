"""The vBPE page: what it measures is right, it is self-contained, and its pictures show the
tokens.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ChameleonVQVAE, ChameleonVQVAEConfig

from beingvl.errors import InputError
from beingvl.images.pictures import BORDER
from beingvl.report import vbpe_pictures
from beingvl.report.vbpe import measure, report_vbpe
from beingvl.vbpe.compression import Compression
from beingvl.vbpe.published import LegacyVisualBPE
from beingvl.vbpe.reference import TokenGrid, train_reference
from beingvl.vbpe.train_vbpe import train_vbpe
from beingvl.vbpe.visual_bpe import VisualBPE, owners
from tests.images.test_vqgan import SIZES, make_images, make_janus


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
    sample = measure(vbpe, [tmp_path / "codes.npy"], 2000, 0)
    grids = [TokenGrid(grid) for grid in codes]
    lengths = [codes.size]
    for rank, merge in enumerate(vbpe.merges.tolist()):
        for grid in grids:
            grid.apply(tuple(merge), 16 + rank)
        lengths.append(sum(len(grid.ids) for grid in grids))
    assert sample.compression.tokens.tolist() == pytest.approx(
        [length / len(codes) for length in lengths]
    )
    assert (
        sample.used.tolist()
        == np.bincount([i for grid in grids for i in grid.stream()], minlength=56).tolist()
    )
    for image, grid in enumerate(grids):
        owner = owners(vbpe, sample.stream(image), 8, 8)
        anchors = sorted(grid.ids)
        assert {(y, x): anchors[owner[y, x]] for y in range(8) for x in range(8)} == grid.owner
    assert sum(vbpe_pictures.count_shapes(vbpe).values()) == 40
    assert len(measure(vbpe, [tmp_path / "codes.npy"], 5, 0).grids) == 5


@pytest.mark.parametrize("given", ["nothing", "codes", "vq", "codes and vq"])
def test_page_is_self_contained_and_pictures_exist(vbpe, vq, tmp_path, given):
    vq.save(tmp_path / "vq")
    folder = report_vbpe(
        tmp_path / "vbpe.json",
        codes=[tmp_path / "codes.npy"] if "codes" in given else [],
        vq=tmp_path / "vq" if "vq" in given else None,
    )
    assert folder == tmp_path / "vbpe_report"
    text = (folder / "report.html").read_text()
    assert not re.search(r"<script|<link|(src|href)\s*=\s*['\"](?!data:|#)", text)
    files = {path.stem.split("-")[0] for path in folder.glob("*.png")}
    assert files == {"largest", "shapes", "sizes"} | (
        {"used", "example", "compression"} if "codes" in given else set()
    )
    for path in folder.glob("*.png"):
        assert Image.open(path).convert("RGB").getextrema() != ((255, 255),) * 3  # not blank
    assert text.count("<figure>") == 24 + len(vbpe_pictures.count_shapes(vbpe).most_common(24)) + (
        24 + 3 if "codes" in given else 0
    )


def test_owners_of_a_grid_drawn_by_hand() -> None:
    # merge 16 = (1 2) side by side, 17 = 3 above 3:   1 2 3     tokens  0 0 1
    #                                                  5 6 3             2 3 1
    vbpe = VisualBPE(16, np.array([[1, 2, 0, 1], [3, 3, 1, 0]]))
    ids = vbpe.encode(np.array([[1, 2, 3], [5, 6, 3]]))
    assert owners(vbpe, ids, 2, 3).tolist() == [[0, 0, 1], [2, 3, 1]]


def test_a_tile_shows_all_cells_and_their_border_and_nothing_else() -> None:
    for cells in ([(0, 0)], [(0, 0), (0, 1), (1, 0)], [(y, 0) for y in range(200)]):
        colours = np.full((len(cells), 3), 140, np.uint8)
        tile = vbpe_pictures.draw_tile(np.array(cells), colours)
        assert tile.shape == (vbpe_pictures.TILE, vbpe_pictures.TILE, 4)
        inside, outside = tile[tile[..., 3] > 0], tile[tile[..., 3] == 0]
        assert {*map(tuple, inside.tolist())} <= {
            (140, 140, 140, 255),
            (46, 46, 46, 255),  # beside the border
            (*BORDER, 255),
        }
        assert not outside.any() and (inside[:, :3] == BORDER).all(axis=1).any()


def test_the_legend_of_the_sizes_lies_above_the_bars(vbpe, tmp_path):
    figure = vbpe_pictures.draw_charts(vbpe, measure(vbpe, [tmp_path / "codes.npy"], 2000, 0))[
        "sizes"
    ]
    figure.draw_without_rendering()
    [axes] = figure.axes
    assert (
        axes.bbox.y1 <= axes.get_legend().get_window_extent().y0
        and axes.get_legend().get_window_extent().y1 <= figure.bbox.y1
    )


def test_borders_lie_between_tokens(vbpe, tmp_path):
    sample = measure(vbpe, [tmp_path / "codes.npy"], 2000, 0)
    picture = vbpe_pictures.draw_example(vbpe, sample, 0, None)
    side = picture.shape[0] // 8
    owner = owners(vbpe, sample.stream(0), 8, 8)
    for y in range(8):
        for x in range(1, 8):
            line = picture[y * side + side // 2, x * side]  # and the pixel before it
            inside = picture[y * side + side // 2, x * side + side // 2]
            assert (owner[y, x] == owner[y, x - 1]) == (line.tolist() == inside.tolist())


def test_pixels_of_a_token_come_from_an_image_that_has_it(vbpe, vq, tmp_path):
    sample = measure(vbpe, [tmp_path / "codes.npy"], 2000, 0)
    for image_id in np.flatnonzero(sample.used)[-10:].tolist():
        grid, top, left = vbpe_pictures.find_token(vbpe, image_id, sample, vq.grid)
        dy, dx, code = vbpe.cells(image_id)
        assert grid[top + dy, left + dx].tolist() == code.tolist()
    grid, top, left = vbpe_pictures.find_token(vbpe, vbpe.num_ids - 1, None, vq.grid)
    dy, dx, code = vbpe.cells(vbpe.num_ids - 1)
    assert grid[top + dy, left + dx].tolist() == code.tolist()


def test_wrong_input_is_refused(vbpe, vq, tmp_path):
    LegacyVisualBPE(16, []).save(tmp_path / "legacy.json")
    with pytest.raises(InputError, match="tokens have no fixed shape to show"):
        report_vbpe(tmp_path / "legacy.json")
    with pytest.raises(InputError, match="--max_images is 0"):
        report_vbpe(tmp_path / "vbpe.json", codes=[tmp_path / "codes.npy"], max_images=0)
    np.save(tmp_path / "other.npy", np.zeros((2, 3, 3), np.uint8))
    with pytest.raises(InputError, match="grids of several sizes"):
        report_vbpe(tmp_path / "vbpe.json", codes=[tmp_path / "codes.npy", tmp_path / "other.npy"])
    np.save(tmp_path / "other.npy", np.full((2, 3, 3), 16))
    with pytest.raises(InputError, match="codes 16 … 16, expected 0 … 15"):
        report_vbpe(tmp_path / "vbpe.json", codes=[tmp_path / "other.npy"])
    vq.save(tmp_path / "vq")
    VisualBPE(16, vbpe.merges, {"vqgan": "sha256:another"}).save(tmp_path / "vbpe.json")
    with pytest.raises(InputError, match="do not match: they were made with different vqgan"):
        report_vbpe(tmp_path / "vbpe.json", vq=tmp_path / "vq")


def test_a_vqgan_without_decoder_is_refused(vbpe, tmp_path):
    torch.manual_seed(0)
    ChameleonVQVAE(ChameleonVQVAEConfig(**SIZES, resolution=32)).save_pretrained(
        tmp_path / "chameleon"
    )
    with pytest.raises(InputError, match="has no decoder, so it cannot show pixels"):
        report_vbpe(tmp_path / "vbpe.json", vq=tmp_path / "chameleon")


def test_the_page_says_where_merges_stop_paying_and_on_which_images(tmp_path):
    codes = np.random.default_rng(0).integers(0, 16, (80, 8, 8)).astype(np.uint16)
    codes[:, 2:6, 2:7] = 3
    np.save(tmp_path / "codes.npy", codes[:60])
    np.save(tmp_path / "others.npy", codes[60:])
    auto = train_vbpe(tmp_path / "codes.npy", tmp_path / "auto", num_merges="auto")
    page = report_vbpe(tmp_path / "auto", codes=[tmp_path / "others.npy"]) / "report.html"
    assert "On 3 images held out when it was learnt, merges stop paying off" in page.read_text()
    assert f"knee: {auto.num_merges} merges" in page.read_text()
    assert "20 images measured" in page.read_text()
    train_vbpe(tmp_path / "codes.npy", tmp_path / "all", num_merges=30)
    page = report_vbpe(tmp_path / "all", codes=[tmp_path / "codes.npy"]) / "report.html"
    assert "On 60 images it learnt from, merges stop paying off after" in page.read_text()


def test_a_legend_of_long_names_leaves_the_curve_its_room() -> None:
    curve = Compression.of(10, 1000, np.array([50, 20, 8, 4]))
    names = ("12,345 images held out when it was learnt", "12,345 images it learnt from")
    figure = vbpe_pictures.draw_compression(dict.fromkeys(names, curve))
    figure.draw_without_rendering()
    assert figure.axes[0].get_position().width > 0.7
