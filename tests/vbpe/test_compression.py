"""Where more merges stop paying: the curve is a recount, the knee is Kneedle's, `auto` takes it."""

from __future__ import annotations

import numpy as np
import pytest

from beingvl.errors import InputError
from beingvl.vbpe.compression import Compression
from beingvl.vbpe.train_vbpe import train_vbpe
from beingvl.vbpe.visual_bpe import VisualBPE


def striped(num_images: int, seed: int) -> np.ndarray:
    """[N, 8, 8] uint16 of 40 codes: rows repeat one of four patterns, every third row is noise."""
    patterns = np.random.default_rng(7).integers(0, 40, (4, 8))
    random = np.random.default_rng(seed)
    grids = patterns[random.integers(0, 4, (num_images, 8))]
    grids[:, ::3] = random.integers(0, 40, grids[:, ::3].shape)
    return grids.astype(np.uint16)


def test_one_pass_gives_the_curve_of_every_number_of_merges(tmp_path) -> None:
    np.save(tmp_path / "codes.npy", striped(60, 0))
    vbpe = train_vbpe(tmp_path / "codes.npy", tmp_path / "vbpe", num_merges=30)
    others = [striped(20, 1), striped(10, 2)[:, :5]]
    curve = Compression.measure(vbpe, others)
    for num_merges in range(31):
        shorter = VisualBPE(40, vbpe.merges[:num_merges])
        num_tokens = sum(len(shorter.encode_batch(array)[0]) for array in others)
        assert curve.at(num_merges) == pytest.approx(num_tokens / 30)
    assert curve.num_images == 30


def test_the_knee_is_the_point_farthest_below_the_line_between_the_ends() -> None:
    applied = np.array([50, 20, 8, 4, 4, 4, 4, 4, 2, 0])  # the mean merge saves 10
    curve = Compression.of(10, 1000, applied)
    assert curve.knee == 2 and curve.at(2) == 93
    sentence = "merges stop paying off after the first 2: 93.0 tokens per image"
    assert curve.describe() == f"{sentence}; it is 100.0 with none and 90.0 with all 10"
    assert Compression.of(10, 1000, np.zeros(5, int)).knee == 0
    assert Compression.of(10, 1000, np.zeros(0, int)).knee == 0
    many = Compression.of(10, 100_000, np.arange(1000, 0, -1))
    kept = Compression.from_dict(many.to_dict())
    assert kept.knee == many.knee == 500 and kept.at(500) == many.at(500) and len(kept.merges) <= 65


def test_auto_takes_the_knee_of_images_it_did_not_learn_from(tmp_path, capsys) -> None:
    codes = striped(200, 0)
    np.save(tmp_path / "codes.npy", codes)
    found = train_vbpe(tmp_path / "codes.npy", tmp_path / "auto", num_merges="auto")
    shown = capsys.readouterr().out
    is_held = np.arange(200) % 20 == 19
    np.save(tmp_path / "others.npy", codes[~is_held])
    every = train_vbpe(tmp_path / "others.npy", tmp_path / "all", num_merges=8192)
    knee = Compression.measure(every, [codes[is_held]]).knee
    assert 0 < knee < every.num_merges
    assert np.array_equal(found.merges, every.merges[:knee])
    exact = train_vbpe(tmp_path / "others.npy", tmp_path / "exact", num_merges=knee)
    for name in ("num_images", "num_cells", "num_tokens"):
        assert found.parameters[name] == exact.parameters[name]
    assert f"On 10 held-out images, merges stop paying off after the first {knee:,}:" in shown
    assert VisualBPE.load(tmp_path / "auto").parameters["held_out"]["num_images"] == 10


def test_held_out_codes_are_measured_and_change_no_merge(tmp_path, capsys) -> None:
    np.save(tmp_path / "codes.npy", striped(60, 0))
    np.save(tmp_path / "others.npy", striped(30, 1))
    inputs = {"data_path": tmp_path / "codes.npy", "num_merges": 40}
    plain = train_vbpe(output_path=tmp_path / "plain", **inputs)
    others = [tmp_path / "others.npy"]
    judged = train_vbpe(output_path=tmp_path / "judged", **inputs, held_out=others)
    assert judged == plain and "held_out" not in plain.parameters
    assert "On 30 held-out images, merges stop paying off after" in capsys.readouterr().out


def test_what_cannot_be_held_out_is_said(tmp_path) -> None:
    np.save(tmp_path / "few.npy", striped(19, 0))
    with pytest.raises(InputError, match="every 20th image, and there are 19; give codes"):
        train_vbpe(tmp_path / "few.npy", tmp_path / "vbpe", num_merges="auto")
    np.save(tmp_path / "unlike.npy", striped(5, 0) + 40)
    with pytest.raises(InputError, match=r"unlike.npy, image 0: codes .* expected 0 … 39"):
        train_vbpe(tmp_path / "few.npy", tmp_path / "vbpe", held_out=[tmp_path / "unlike.npy"])
    assert not (tmp_path / "vbpe").exists()
