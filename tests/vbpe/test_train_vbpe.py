"""`beingvl train-vbpe`: every kind of input, every option, every error, and byte-equal results
after an interruption.
"""

from __future__ import annotations

import io
import pickle
import re

import numpy as np
import pytest

from beingvl.commands.main import main
from beingvl.vbpe.reference import train_reference
from beingvl.vbpe.visual_bpe import VisualBPE
from tests.code_folder import write_codes


@pytest.fixture
def codes() -> np.ndarray:
    """[30, 6, 6] uint16 of 12 codes with structure: every code is likely followed by its
    successor.
    """
    rng = np.random.default_rng(0)
    grids = rng.integers(0, 12, (30, 6, 6))
    follow = rng.random(grids.shape) < 0.5
    for x in range(1, 6):
        grids[:, :, x] = np.where(follow[:, :, x], (grids[:, :, x - 1] + 1) % 12, grids[:, :, x])
    return grids.astype(np.uint16)


def train(*options: object) -> int:
    return main(["train-vbpe", *map(str, options)])


def write_codes_folder(folder, codes, num_codes=12, vqgan="sha256:a"):
    return write_codes(folder, codes, num_codes, {"vqgan": vqgan})


def test_learns_from_a_codes_folder_what_the_reference_learns(tmp_path, codes, capsys):
    folder = write_codes_folder(tmp_path / "vq_codes", codes)
    assert (
        train(
            "--data-path",
            folder,
            "--output-path",
            tmp_path / "out",
            "--num-merges",
            25,
            "--validate_data",
        )
        == 0
    )
    vbpe = VisualBPE.load(tmp_path / "out")
    merges, streams = train_reference(list(codes), 12, 25)
    assert [tuple(merge) for merge in vbpe.merges.tolist()] == merges
    assert vbpe.lineage == {"vqgan": "sha256:a"} and vbpe.grid == (6, 6) and vbpe.num_codes == 12
    assert (
        vbpe.parameters["num_tokens"] == sum(map(len, streams))
        and vbpe.parameters["num_images"] == 30
    )
    shown = capsys.readouterr().out
    assert (
        "30 images of 6 x 6, uint16" in shown
        and "merges of 2 cells" in shown
        and "unused codes" in shown
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
@pytest.mark.parametrize("flat", [False, True])
def test_types_and_flat_files_give_the_same_file(tmp_path, codes, dtype, flat):
    np.save(tmp_path / "a.npy", codes)
    np.save(tmp_path / "b.npy", (codes.reshape(30, 36) if flat else codes).astype(dtype))
    for name in "ab":
        assert (
            train(
                "--data_path",
                tmp_path / f"{name}.npy",
                "--output_path",
                tmp_path / f"{name}.json",
                "--num_merges",
                10,
            )
            == 0
        )
    assert VisualBPE.load(tmp_path / "a.json") == VisualBPE.load(tmp_path / "b.json")


def test_offset_codes_and_their_three_options(tmp_path, codes):
    np.save(tmp_path / "raw.npy", codes)
    np.save(tmp_path / "offset.npy", codes.astype(np.int32) + 128261)
    assert (
        train(
            "--data_path",
            tmp_path / "raw.npy",
            "--output_path",
            tmp_path / "raw.json",
            "--num_merges",
            9,
            "--init_size",
            12,
        )
        == 0
    )
    options = ["--vocab_pad", 128261, "--vocab_end", 128273, "--init_size", 12]
    assert (
        train(
            "--data_path",
            tmp_path / "offset.npy",
            "--output_path",
            tmp_path / "o.json",
            "--num_merges",
            9,
            *options,
        )
        == 0
    )
    assert VisualBPE.load(tmp_path / "raw.json") == VisualBPE.load(tmp_path / "o.json")


def test_mixed_grid_sizes_from_a_folder_of_files(tmp_path, codes):
    np.save(tmp_path / "a.npy", codes)
    np.save(tmp_path / "b.npy", codes[:5, :2, :].reshape(5, 3, 4))
    assert (
        train(
            "--data_path",
            tmp_path,
            "--output_path",
            tmp_path / "out.json",
            "--num_merges",
            20,
            "--alpha",
            0,
        )
        == 0
    )
    merges, _ = train_reference(
        [*codes, *codes[:5, :2, :].reshape(5, 3, 4)], int(codes.max()) + 1, 20, 0.0
    )
    vbpe = VisualBPE.load(tmp_path / "out.json")
    assert [tuple(merge) for merge in vbpe.merges.tolist()] == merges and vbpe.grid is None


def test_sample_depends_on_the_seed_only(tmp_path, codes):
    np.save(tmp_path / "a.npy", codes[:10])
    np.save(tmp_path / "b.npy", codes[10:])
    for name, seed in (("x", 1), ("y", 1), ("z", 2)):
        options = ["--max_images", 12, "--seed", seed, "--num_merges", 10, "--init_size", 12]
        assert (
            train(
                "--data_path",
                tmp_path / "a.npy",
                tmp_path / "b.npy",
                "--output_path",
                tmp_path / f"{name}.json",
                *options,
            )
            == 0
        )
    x, y, z = ((tmp_path / f"{name}.json").read_bytes() for name in "xyz")
    assert x == y != z
    chosen = np.sort(np.random.default_rng(1).choice(30, 12, replace=False))
    merges, _ = train_reference(list(codes[chosen]), 12, 10)
    assert [tuple(merge) for merge in VisualBPE.load(tmp_path / "x.json").merges.tolist()] == merges


def test_stops_when_nothing_is_left_and_says_so(tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.zeros((2, 3, 3), np.uint16))
    assert (
        train(
            "--data_path",
            tmp_path / "a.npy",
            "--output_path",
            tmp_path / "v.json",
            "--num_merges",
            1000,
        )
        == 0
    )
    assert 0 < VisualBPE.load(tmp_path / "v.json").num_merges < 10
    assert "merges instead of 1000: no other pair occurs 2 times" in capsys.readouterr().out


def test_interrupted_run_continues_to_the_same_bytes(tmp_path, codes, capsys, monkeypatch):
    from beingvl.vbpe.trainer import Trainer

    np.save(tmp_path / "a.npy", codes)
    base = ["--data_path", tmp_path / "a.npy", "--num_merges", 35]
    assert train(*base, "--output_path", tmp_path / "whole.json") == 0
    options = [*base, "--output_path", tmp_path / "parts.json", "--save_intermediate", 10]

    def interrupted(self, until, learn=Trainer.learn):
        if self.num_merges >= 20:
            raise KeyboardInterrupt
        return learn(self, until)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "learn", interrupted)
        assert train(*options) == 130
    assert VisualBPE.load(tmp_path / "parts.partial.json").num_merges == 20
    assert not (tmp_path / "parts.json").exists()

    assert train(*options, "--alpha", 0) == 2
    expected = (
        "was made with different alpha (found 0.3, asked for 0.0); use the same options, or delete"
    )
    assert expected in capsys.readouterr().err
    assert train(*options, "--init_size", 13) == 2
    assert "different number of codes (found 12, asked for 13)" in capsys.readouterr().err
    assert train(*options, "--num_merges", 15) == 2
    assert "already has 20 merges, more than --num_merges 15" in capsys.readouterr().err

    assert train(*options) == 0
    assert "Continuing from" in capsys.readouterr().out
    assert (tmp_path / "parts.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert not (tmp_path / "parts.partial.json").exists()


def test_import_of_a_published_vocabulary(tmp_path, capsys):
    (tmp_path / "vbpe.pkl").write_bytes(pickle.dumps([((3, 4), 12), ((12, 5), 13)]))
    assert train("--import_pkl", tmp_path / "vbpe.pkl", "--output_path", tmp_path / "out") == 0
    vbpe = VisualBPE.load(tmp_path / "out" / "vbpe.json")
    assert vbpe.kind == "legacy" and vbpe.merges.tolist() == [[3, 4], [12, 5]]
    assert "12 codes and 2 merges (legacy: it cannot be decoded)" in capsys.readouterr().out


# ---- finished outputs ----


def test_a_finished_folder_is_reused_verified_and_never_lost(tmp_path, codes, capsys):
    source, out = write_codes_folder(tmp_path / "vq_codes", codes), tmp_path / "out"
    learn = ["--data_path", source, "--output_path", out, "--num_merges"]
    assert train(*learn, 5) == 0
    before = (out / "vbpe.json").stat().st_mtime_ns
    assert train(*learn, 5) == 0
    assert "is finished already, with the same inputs: reused" in capsys.readouterr().out
    assert train(*learn, 6) == 2
    assert (
        "finished, but with different num_merges (found 5, asked for 6)" in capsys.readouterr().err
    )
    assert (out / "vbpe.json").stat().st_mtime_ns == before
    assert main(["verify", str(out)]) == 0
    assert train(*learn, 6, "--overwrite") == 0
    assert VisualBPE.load(out).num_merges == 6 and main(["verify", str(out)]) == 0
    text = (out / "vbpe.json").read_text()
    (out / "vbpe.json").write_text(text.replace('"alpha": 0.3', '"alpha": 0.4'))
    assert main(["verify", str(out)]) == 2
    assert "vbpe.json does not have the hash" in capsys.readouterr().err


def test_a_single_file_is_not_replaced_unasked(tmp_path, codes, capsys):
    np.save(tmp_path / "a.npy", codes)
    learn = [
        "--data_path",
        tmp_path / "a.npy",
        "--output_path",
        tmp_path / "v.json",
        "--num_merges",
    ]
    assert train(*learn, 5) == 0 and main(["verify", str(tmp_path / "v.json")]) == 0
    assert train(*learn, 6) == 2
    assert "v.json exists; choose another name or add --overwrite" in capsys.readouterr().err
    assert VisualBPE.load(tmp_path / "v.json").num_merges == 5
    assert (
        train(*learn, 6, "--overwrite") == 0 and VisualBPE.load(tmp_path / "v.json").num_merges == 6
    )


def test_a_folder_with_other_things_is_not_taken(tmp_path, codes, capsys):
    np.save(tmp_path / "a.npy", codes)
    assert train("--data_path", tmp_path / "a.npy", "--output_path", tmp_path) == 2
    assert "holds 'a.npy' too; give vBPE a folder of its own" in capsys.readouterr().err


def test_nothing_finished_is_lost_or_mistaken(tmp_path, codes, capsys):
    source, out = write_codes_folder(tmp_path / "vq_codes", codes), tmp_path / "out"
    learn = ["--data_path", source, "--num_merges", 5]
    assert train(*learn, "--output_path", out) == 0
    text = (out / "vbpe.json").read_text()
    assert (
        train(*learn, "--output_path", out / "vbpe.json", "--overwrite") == 2
    )  # or the manifest would be wrong
    assert (
        train(*learn, "--output_path", out, "--overwrite", "--init_size", 5) == 2
    )  # a wrong number of codes
    assert (out / "vbpe.json").read_text() == text and main(["verify", str(out)]) == 0
    (out / "manifest.json").unlink()
    (out / ".vbpe.json.12.tmp").write_text("a write that was killed")
    assert train(*learn, "--output_path", out) == 2
    assert "holds a vocabulary without a manifest" in capsys.readouterr().err
    assert (
        train(*learn, "--output_path", out, "--overwrite") == 0
        and (out / "vbpe.json").read_text() == text
    )
    assert train(*learn, "--output_path", source / "codes.npy") == 2


# ---- wrong input ----


# name -> (the file's content made from good codes [30, 6, 6], options, message)
WRONG = {
    "float": (lambda codes: codes.astype(np.float32), [], "holds float32, expected integer codes"),
    "nan": (lambda codes: np.full((2, 3, 3), np.nan), [], "holds float64, expected integer codes"),
    "object": (lambda codes: np.array([[1, "a"]], dtype=object), [], "is not a readable .npy file"),
    "one row": (lambda codes: codes[0, 0], [], r"has shape \[6\], expected integer codes"),
    "4-D": (lambda codes: codes[None], [], r"has shape \[1, 30, 6, 6\]"),
    "no image": (lambda codes: codes[:0], [], r"has shape \[0, 6, 6\]|is not a readable"),
    "no file": (lambda codes: None, [], "does not exist; expected VQ codes"),
    "no bytes": (lambda codes: b"", [], "is not a readable .npy file of codes"),
    "text": (lambda codes: b"12 13 14", [], "is not a readable .npy file of codes"),
    "truncated": (
        lambda codes: npy_bytes(codes)[:-100],
        [],
        "is not a readable .npy file of codes",
    ),
    "not square": (
        lambda codes: codes.reshape(30, 36)[:, :35],
        [],
        "has 35 codes per image, which is not 5 x 5: give --grid H W",
    ),
    "other grid": (
        lambda codes: codes,
        ["--grid", 3, 12],
        "has grids of 6 x 6, --grid says 3 x 12",
    ),
    "too large": (
        lambda codes: np.zeros((1, 1, 2048), np.uint8),
        [],
        "has grids of 1 x 2048, expected at most 2047",
    ),
    "outside": (
        lambda codes: codes,
        ["--init_size", 11],
        r"image \d+: codes 0 … 11, expected 0 … 10; the files are not of this",
    ),
    "negative": (
        lambda codes: codes.astype(int) - 1,
        ["--init_size", 12],
        r"codes -1 … 1[01], expected 0 … 11",
    ),
    "raw, padded": (
        lambda codes: codes,
        ["--init_size", 12, "--vocab_pad", 500],
        "they are raw already: leave out --vocab_pad 500",
    ),
    "raw, padded, no size": (
        lambda codes: codes,
        ["--vocab_pad", 500],
        "-488 codes, expected 1 to 65536; are --init_size",
    ),
    "offset": (
        lambda codes: codes + 500,
        ["--init_size", 12],
        r"give the offset as --vocab_pad \(their smallest id is 500\)",
    ),
    "end": (
        lambda codes: codes,
        ["--init_size", 12, "--vocab_end", 13],
        "--init_size says 12, --vocab_end less --vocab_pad says 13",
    ),
    "too many codes": (
        lambda codes: codes.astype(int) + 70_000,
        [],
        "70012 codes, expected 1 to 65536",
    ),
    "too many merges": (
        lambda codes: codes,
        ["--num_merges", 600_000],
        "expected at most 524288 together",
    ),
    "merges": (
        lambda codes: codes,
        ["--num_merges", -1],
        "--num_merges is -1, expected at least 0",
    ),
    "alpha": (lambda codes: codes, ["--alpha", "nan"], "--alpha is nan, expected at least 0"),
    "sigma": (lambda codes: codes, ["--sigma", 0], "--sigma is 0.0, expected more than 0"),
    "min_count": (lambda codes: codes, ["--min_count", 0], "--min_count is 0, expected at least 1"),
    "max_images": (
        lambda codes: codes,
        ["--max_images", 0],
        "--max_images is 0, expected at least 1",
    ),
}


def npy_bytes(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files_and_options_end_in_one_sentence(tmp_path, codes, capsys, name):
    make, options, message = WRONG[name]
    content = make(codes)
    path = tmp_path / "codes_of_something.npy"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else npy_bytes(content))
    assert train("--data_path", path, "--output_path", tmp_path / "v.json", *options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(message, error), error
    assert not (tmp_path / "v.json").exists()


def test_wrong_folders(tmp_path, codes, capsys):
    first = write_codes_folder(tmp_path / "first", codes)
    other = write_codes_folder(tmp_path / "other", codes, vqgan="sha256:b")
    larger = write_codes_folder(tmp_path / "larger", codes, num_codes=13)
    (tmp_path / "incomplete").mkdir()
    np.save(tmp_path / "incomplete" / "codes.npy", codes)
    (tmp_path / "nothing").mkdir()
    for paths, message in (
        ([first, other], "do not match: they were made with different vqgan"),
        ([first, larger], "the number of codes is not clear"),
        ([first, "--init_size", "20"], "--init_size says 20"),
        ([tmp_path / "incomplete"], "has no manifest.json, so it is incomplete"),
        ([tmp_path / "nothing"], "holds neither codes.npy nor other .npy files"),
    ):
        assert train("--output_path", tmp_path / "v.json", "--data_path", *paths) == 2
        assert message in capsys.readouterr().err
    assert train("--output_path", tmp_path / "v.json") == 2
    assert "--codes is missing" in capsys.readouterr().err
