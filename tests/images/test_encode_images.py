"""encode-images: the rows are the VQ-GAN's codes in key order, however computed; what cannot be
read is accounted for.
"""

import json
import os
import shutil
import subprocess
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import JanusVQVAE, JanusVQVAEConfig

from beingvl.artefact.manifest import MANIFEST_FILE, read_manifest, verify_folder
from beingvl.commands.main import main
from beingvl.errors import InputError
from beingvl.images import image_source
from beingvl.images.image_source import NO_STAMP, FolderImages, TarImages, open_images
from beingvl.images.vq_codes import CODES_FILE, REJECTED_FILE, CodeFolder
from beingvl.images.vqgan import VQGAN, make_processor
from beingvl.sources.tables import key_of
from tests.data.forms import write_parquet
from tests.launcher import ENVIRONMENT, free_port

KEYS = ["b/2.png", "a.png", "b/10.JPG", "z z/ü.png", "b/1.png"]


def save_vqgan(folder, seed):
    torch.manual_seed(seed)
    sizes = {
        "embed_dim": 4,
        "num_embeddings": 32,
        "latent_channels": 8,
        "base_channels": 32,
        "num_res_blocks": 0,
    }
    model = JanusVQVAE(
        JanusVQVAEConfig(**sizes, channel_multiplier=[1, 1], num_patches=8, initializer_range=0.2)
    )
    VQGAN(model, make_processor(16)).save(folder)
    return folder


@pytest.fixture(scope="module")
def vq_path(tmp_path_factory):
    return save_vqgan(tmp_path_factory.mktemp("vq") / "vqgan", seed=0)


@pytest.fixture
def image_path(tmp_path):
    rng = np.random.default_rng(0)
    for key in KEYS:
        path = tmp_path / "images" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    (tmp_path / "images" / "notes.txt").write_text("not an image")
    (tmp_path / "images" / ".hidden.png").write_text("not an image")
    return tmp_path / "images"


def encode(image_path, vq_path, output, **options):
    words = [f"--{name}={value}" for name, value in options.items() if value is not True]
    flags = [f"--{name}" for name, value in options.items() if value is True]
    paths = [f"--image_path={image_path}", f"--vq_path={vq_path}", f"--output_path={output}"]
    return main(["encode-images", *paths, *words, *flags])


def test_each_row_is_the_image_of_its_key(image_path, vq_path, tmp_path):
    assert encode(image_path, vq_path, tmp_path / "codes") == 0
    folder, vqgan = CodeFolder(tmp_path / "codes"), VQGAN.load(vq_path)
    assert list(folder.keys) == sorted(KEYS)
    assert (
        folder.codes.shape == (5, 8, 8)
        and folder.codes.dtype == np.uint16
        and isinstance(folder.codes, np.memmap)
    )
    assert len(np.unique(folder.codes)) > 4
    for key in KEYS:
        expected = vqgan.encode(vqgan.preprocess([image_path / key]))[0]
        np.testing.assert_array_equal(folder.codes[folder.row(key)], expected)
    manifest = verify_folder(tmp_path / "codes")
    assert manifest.lineage == {"vqgan": vqgan.fingerprint(), "exif": "apply"}
    assert manifest.counts == {"images": 5, "rejected": 0}
    assert (folder.num_codes, folder.grid) == (32, (8, 8))


def test_batches_and_workers_do_not_change_a_bit(image_path, vq_path, tmp_path):
    hashes = set()
    for number, options in enumerate(
        [{"batch_size": 1}, {"batch_size": 2, "num_workers": 2}, {"batch_size": 64}]
    ):
        output = tmp_path / f"codes-{number}"
        assert encode(image_path, vq_path, output, **options) == 0
        hashes.add(
            (read_manifest(output).content_hash, read_manifest(output).details["request"]["images"])
        )
    assert len(hashes) == 1


@pytest.mark.parametrize("lines", [False, True])
def test_only_the_images_that_a_json_names(image_path, vq_path, tmp_path, lines):
    rows = [{"image": "b/2.png"}, {"conversations": []}, {"image": ["a.png", "b/2.png"]}]
    text = "\n".join(map(json.dumps, rows)) + "\n" if lines else json.dumps(rows)
    (tmp_path / "rows.json").write_text(text)
    assert encode(image_path, vq_path, tmp_path / "codes", json_path=tmp_path / "rows.json") == 0
    assert list(CodeFolder(tmp_path / "codes").keys) == ["a.png", "b/2.png"]


def test_the_images_inside_a_table_of_rows(image_path, vq_path, tmp_path):
    pictures = {"bytes": (image_path / "a.png").read_bytes()}
    table = write_parquet(tmp_path / "captions", [{"image": pictures, "caption": "a"}])
    to = ["encode-images", f"--vq_path={vq_path}", f"--output_path={tmp_path / 'codes'}"]
    assert main(to) == 2, "neither images nor rows"
    assert main([*to, f"--json_path={table}"]) == 0
    assert list(CodeFolder(tmp_path / "codes").keys) == [key_of(table, 0, 0)]


def test_unreadable_images_are_rejected_with_reasons(image_path, vq_path, tmp_path):
    (image_path / "b/1.png").write_bytes(b"no image")
    names = ["a.png", "b/1.png", "gone.png", "../images/a.png", str(image_path / "a.png")]
    (tmp_path / "rows.json").write_text(json.dumps([{"image": name} for name in names]))
    options = {"json_path": tmp_path / "rows.json", "max_rejected": 0.8, "batch_size": 2}
    assert encode(image_path, vq_path, tmp_path / "codes", **options) == 0
    folder = CodeFolder(tmp_path / "codes")
    assert list(folder.keys) == ["a.png"] and folder.manifest.counts == {"images": 1, "rejected": 4}
    for name, reason in zip(
        names[1:], ["no known format", "No such file", "leaves", "leaves"], strict=True
    ):
        with pytest.raises(InputError, match=f"was rejected when .*{reason}"):
            folder.row(name)
    with pytest.raises(
        InputError, match=r"has no codes of other\.png .it has 1 images, a\.png is one.; make"
    ):
        folder.row("other.png")


def test_names_that_are_no_text_are_rejected_with_a_reason(image_path, vq_path, tmp_path, capsys):
    data = (image_path / "a.png").read_bytes()
    (image_path / os.fsdecode(b"\xff.png")).write_bytes(data)
    for output in (
        tmp_path / "codes",
        tmp_path / os.fsdecode(b"codes \xff"),
    ):  # twice: the second time it is reused
        for _ in range(2):
            assert encode(image_path, vq_path, output, max_rejected=0.5) == 0
    assert "reused" in capsys.readouterr().out
    folder = CodeFolder(tmp_path / "codes")
    assert list(folder.keys) == sorted(KEYS)
    assert folder.manifest.counts == {"images": 5, "rejected": 1}
    with pytest.raises(
        InputError, match=r"\\udcff.png was rejected .*the name is not UTF-8; rename the file"
    ):
        folder.row(os.fsdecode(b"\xff.png"))

    names = ["\ud83d.png", "a.png"]
    (tmp_path / "rows.json").write_text(json.dumps([{"image": name} for name in names]))
    assert (
        encode(
            image_path,
            vq_path,
            tmp_path / "named",
            json_path=tmp_path / "rows.json",
            max_rejected=0.5,
        )
        == 0
    )
    assert list(CodeFolder(tmp_path / "named").keys) == ["a.png"]
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in (b"\xff.png", b"a.png"):
            tar.add(image_path / "a.png", os.fsdecode(name))
    assert encode(tmp_path / "0.tar", vq_path, tmp_path / "tarred", max_rejected=0.5) == 0
    assert CodeFolder(tmp_path / "tarred").manifest.counts == {"images": 1, "rejected": 1}


def test_too_many_unreadable_images_stop_the_run(image_path, vq_path, tmp_path, capsys):
    (image_path / "b/1.png").write_bytes(b"no image")
    assert encode(image_path, vq_path, tmp_path / "codes", max_rejected=0.19) == 2
    assert (
        "1 of 5 images rejected so far, --max_rejected is 0.19; the last: b/1.png cannot be read"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "codes" / MANIFEST_FILE).exists()
    with pytest.raises(InputError, match="incomplete"):
        CodeFolder(tmp_path / "codes")
    assert json.loads((tmp_path / "codes" / REJECTED_FILE).read_text())["key"] == "b/1.png"
    assert encode(image_path, vq_path, tmp_path / "codes", max_rejected=0.2) == 0
    assert read_manifest(tmp_path / "codes").counts == {"images": 4, "rejected": 1}


def test_no_readable_image_at_all(image_path, vq_path, tmp_path, capsys):
    for key in KEYS:
        (image_path / key).write_bytes(b"no image")
    assert encode(image_path, vq_path, tmp_path / "codes", max_rejected=1) == 2
    assert "none of the 5 images could be read" in capsys.readouterr().err


def test_a_finished_output_is_reused_refused_or_replaced(image_path, vq_path, tmp_path, capsys):
    output = tmp_path / "codes"
    assert encode(image_path, vq_path, output) == 0
    before = (output / MANIFEST_FILE).stat().st_mtime_ns
    assert encode(image_path, vq_path, output, batch_size=2) == 0
    assert (
        "reused" in capsys.readouterr().out
        and (output / MANIFEST_FILE).stat().st_mtime_ns == before
    )

    other_vq = save_vqgan(tmp_path / "other", seed=1)
    assert encode(image_path, other_vq, output) == 2
    assert "with different vqgan" in capsys.readouterr().err
    Image.new("RGB", (20, 24)).save(image_path / "a.png")
    assert encode(image_path, vq_path, output) == 2
    assert "with different images" in capsys.readouterr().err
    assert (output / MANIFEST_FILE).stat().st_mtime_ns == before
    assert encode(image_path, other_vq, output, overwrite=True) == 0
    assert read_manifest(output).lineage["vqgan"] == VQGAN.load(other_vq).fingerprint()


def test_a_finished_output_reads_no_image_again_that_looks_the_same(
    image_path, vq_path, tmp_path, capsys
):
    tar_path = tmp_path / "images.tar"
    with tarfile.open(tar_path, "w") as tar:
        tar.add(image_path / "a.png", "a.png")
    in_tar = (tar_path, tar_path.read_bytes().index((image_path / "a.png").read_bytes()) + 60)
    for number, (path, place) in enumerate([(image_path / "a.png", 60), in_tar]):
        source, output = image_path if number == 0 else tar_path, tmp_path / f"codes-{number}"
        assert encode(source, vq_path, output) == 0
        times, data = path.stat(), bytearray(path.read_bytes())
        data[place] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert (
            encode(source, vq_path, output) == 0 and "reused" in capsys.readouterr().out
        )  # or it would see the other bit
        os.utime(path)
        assert (
            encode(source, vq_path, output) == 2
            and "with different images" in capsys.readouterr().err
        )
        data[place] ^= 1
        path.write_bytes(data)  # the same bytes, later: read, and found equal
        assert encode(source, vq_path, output) == 0 and "reused" in capsys.readouterr().out
    for change in (
        lambda: (image_path / "a.png").unlink(),
        lambda: shutil.copy(image_path / "b/1.png", image_path / "new.png"),
    ):
        change()
        assert (
            encode(image_path, vq_path, tmp_path / "codes-0") == 2
            and "with different images" in capsys.readouterr().err
        )


FAILING_DISK = "/proc/self"  # the kernel answers reads of its file `mem` with an I/O error


@pytest.fixture
def failing_path(image_path, tmp_path):
    """The folder of the image c/mem, a link to FAILING_DISK, and a list that names c/mem third."""
    shutil.copytree(image_path, tmp_path / "whole")
    (image_path / "c").symlink_to(FAILING_DISK)
    (tmp_path / "whole/c").mkdir()
    shutil.copy(image_path / "a.png", tmp_path / "whole/c/mem")
    (tmp_path / "list.txt").write_text("a.png\nb/1.png\nc/mem\nz z/ü.png\n")
    return image_path / "c"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_disk_that_fails_ends_the_run_and_loses_no_image(
    image_path, failing_path, vq_path, tmp_path, capsys, monkeypatch, num_workers
):
    options = {"images_per_part": 2, "list_path": tmp_path / "list.txt"}
    assert encode(tmp_path / "whole", vq_path, tmp_path / "expected", **options) == 0
    monkeypatch.setattr(image_source, "PAUSES_SECONDS", (0.01,))
    options |= {"num_workers": num_workers, "max_rejected": 1}
    assert encode(image_path, vq_path, tmp_path / "codes", **options) == 2
    message = capsys.readouterr().err
    assert (
        f"Input/output error ({failing_path}/mem); nothing finished is lost: check the disk and "
        "start the same" in message
    )
    assert [part.name for part in (tmp_path / "codes").glob("parts.tmp/0*")] == ["00000"]
    failing_path.unlink()
    shutil.copytree(tmp_path / "whole/c", failing_path)
    assert encode(image_path, vq_path, tmp_path / "codes", **options) == 0
    assert (
        read_manifest(tmp_path / "codes").content_hash
        == read_manifest(tmp_path / "expected").content_hash
    )


def test_a_disk_that_fails_once_is_asked_again(
    image_path, failing_path, vq_path, tmp_path, monkeypatch
):
    pauses = []

    def recover(seconds):
        pauses.append(seconds)
        if len(pauses) == 2:
            failing_path.unlink()
            shutil.copytree(tmp_path / "whole/c", failing_path)

    monkeypatch.setattr("beingvl.images.image_source.time.sleep", recover)
    options = {"list_path": tmp_path / "list.txt"}
    assert encode(image_path, vq_path, tmp_path / "codes", **options) == 0
    assert CodeFolder(tmp_path / "codes").manifest.counts == {"images": 4, "rejected": 0}
    assert pauses == list(image_source.PAUSES_SECONDS[:2])
    (image_path / "a.png").unlink()  # what is not there is not waited for
    assert FolderImages(image_path).stamp("a.png") == NO_STAMP
    with pytest.raises(InputError, match="No such file"):
        FolderImages(image_path).read("a.png")
    assert len(pauses) == 2


def test_a_tar_that_cannot_be_read_is_no_missing_image(image_path, vq_path, tmp_path, monkeypatch):
    monkeypatch.setattr(image_source, "PAUSES_SECONDS", (0.01,))
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        tar.add(image_path / "a.png", "a.png")
    images = TarImages([tmp_path / "0.tar"])
    (tmp_path / "0.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"0\.tar"):
        images.read("a.png")


def test_rows_that_name_no_path_are_left_out(image_path, vq_path, tmp_path, capsys):
    rows = [{"image": 7}, {"image": KEYS[0]}, {"image": [None]}, 7]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert encode(image_path, vq_path, tmp_path / "codes", json_path=tmp_path / "rows.json") == 0
    assert "warning: 3 rows were left out, the first is" in capsys.readouterr().out
    assert read_manifest(tmp_path / "codes").counts["images"] == 1


def test_an_overwrite_removes_no_images(image_path, vq_path, tmp_path):
    folder = shutil.copytree(image_path, tmp_path / "both")
    assert encode(folder, vq_path, folder) == 0
    assert set(read_manifest(folder).files) == {
        "codes.npy",
        "code_hashes.npy",
        "keys.jsonl",
        "key_offsets.npy",
        "rejected.jsonl",
    }
    assert encode(folder, vq_path, folder, overwrite=True) == 0
    assert all((folder / key).is_file() for key in KEYS)


WRONG_JSON = {
    "line 1: an object spans several lines": "{",
    "is not valid JSON after element 1": '[{"image": "a.png"}, {]',
    "row 1: expected an object, found int": "[7]",
    "row 1: expected an object whose": '{"image": 7}',
    "row 1: expected an object whose `image`": '[{"image": ["a.png", 7]}]',
    "names no images": '[{"conversations": []}]',
}


@pytest.mark.parametrize("message", WRONG_JSON)
def test_a_wrong_json_is_refused(image_path, vq_path, tmp_path, capsys, message):
    (tmp_path / "rows.json").write_text(WRONG_JSON[message])
    assert encode(image_path, vq_path, tmp_path / "codes", json_path=tmp_path / "rows.json") == 2
    assert message in capsys.readouterr().err


def test_wrong_options_are_refused(image_path, vq_path, tmp_path, capsys):
    for options, message in [
        ({"batch_size": 0}, "--batch_size is 0, expected at least 1"),
        ({"num_workers": -1}, "--num_workers is -1, expected at least 0"),
        ({"max_rejected": -0.1}, "--max_rejected is -0.1, expected at least 0"),
        ({"device": "gpu0"}, "device 'gpu0' cannot be used"),
        ({"device": "cuda:77"}, "device 'cuda:77' cannot be used"),
    ]:
        assert encode(image_path, vq_path, tmp_path / "codes", **options) == 2
        assert message in capsys.readouterr().err
    assert encode(tmp_path / "nowhere", vq_path, tmp_path / "codes") == 2
    assert "nowhere: No such file or directory" in capsys.readouterr().err
    assert (
        main(
            [
                "encode-images",
                "--image_path",
                "/",
                "/",
                f"--vq_path={vq_path}",
                f"--output_path={tmp_path}/codes",
            ]
        )
        == 2
    )
    assert "/ is a folder beside other paths" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert encode(image_path, vq_path, tmp_path / "file") == 2
    assert "a file is in the way" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert encode(tmp_path / "empty", vq_path, tmp_path / "codes") == 2
    assert "has no images" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["codes.npy", "keys.jsonl", "key_offsets.npy"])
def test_files_that_are_truncated_or_gone_are_named(image_path, vq_path, tmp_path, name):
    encode(image_path, vq_path, tmp_path / "codes")
    path = tmp_path / "codes" / name
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(
        InputError, match=f"{name} is damaged .it has {size - 3} bytes, the manifest says {size}"
    ):
        CodeFolder(tmp_path / "codes")
    path.unlink()
    with pytest.raises(InputError, match=f"{name} is damaged .it has 0 bytes"):
        CodeFolder(tmp_path / "codes")


@pytest.mark.parametrize(
    ("start", "found"),
    [(b"\0", "Expecting value"), (b"\xff", "invalid start byte"), (b"7", "it holds 7")],
)
def test_keys_that_are_none_are_named(image_path, vq_path, tmp_path, start, found):
    encode(image_path, vq_path, tmp_path / "codes")
    path = tmp_path / "codes" / "keys.jsonl"
    path.write_bytes(
        b"".join(start.ljust(len(line) - 1) + b"\n" for line in path.read_bytes().splitlines(True))
    )
    for ask in (lambda folder: list(folder.keys), lambda folder: folder.row("a.png")):
        with pytest.raises(InputError, match=f"keys.jsonl is .*{found}.*encode-images"):
            ask(CodeFolder(tmp_path / "codes"))


def test_damaged_codes_are_named(image_path, vq_path, tmp_path):
    assert encode(image_path, vq_path, tmp_path / "codes") == 0
    (tmp_path / "codes" / CODES_FILE).write_bytes(b"\x93NUMPY")
    with pytest.raises(InputError, match="damaged"):
        CodeFolder(tmp_path / "codes")


def test_tar_files_and_lists_give_the_rows_of_the_folder(image_path, vq_path, tmp_path):
    tars = tmp_path / "tars_alone"
    tars.mkdir()
    for number, keys in enumerate([KEYS[:3], KEYS[3:]]):
        with tarfile.open(tars / f"{number}.tar", "w") as tar:
            for key in keys:
                tar.add(image_path / key, key)
                tar.add(image_path / "notes.txt", f"{key}.txt")
    (tmp_path / "list.txt").write_text(
        "\ufeff" + "\r\n".join([*KEYS, "a.png", ""]), encoding="utf-8"
    )
    outputs = [tmp_path / name for name in ("folder", "tars", "folder_of_tars", "list")]
    assert encode(image_path, vq_path, outputs[0]) == 0
    two = [
        "--image_path",
        f"{tars}/0.tar",
        f"{tars}/1.tar",
        f"--vq_path={vq_path}",
        f"--output_path={outputs[1]}",
    ]
    assert main(["encode-images", *two, "--num_workers=2"]) == 0
    assert encode(tars, vq_path, outputs[2]) == 0
    assert encode(image_path, vq_path, outputs[3], list_path=tmp_path / "list.txt") == 0
    assert len({read_manifest(output).content_hash for output in outputs}) == 1


def test_a_folder_of_tables_gives_their_pictures(image_path, vq_path, tmp_path):
    """A table beside image files is of something else, as metadata.parquet of `datasets`."""
    (tmp_path / "tables").mkdir()
    pictures = [{"image": {"bytes": (image_path / key).read_bytes()}} for key in KEYS]
    table = write_parquet(tmp_path / "tables" / "train", pictures)
    assert encode(tmp_path / "tables", vq_path, tmp_path / "inside") == 0
    assert encode(image_path, vq_path, tmp_path / "codes") == 0
    found = CodeFolder(tmp_path / "inside")
    expected = CodeFolder(tmp_path / "codes")
    for number, key in enumerate(KEYS):
        row = found.row(f"train.parquet#{number:09d}/0")
        assert (found.codes[row] == expected.codes[expected.row(key)]).all()
    with pytest.raises(InputError, match=r"2 tables are called train\.parquet, .*: rename one"):
        open_images([table, shutil.copy(table, tmp_path)])
    table.rename(image_path / "metadata.parquet")
    assert open_images([image_path]).keys() == sorted(KEYS)


def test_wrong_tars_and_lists_are_refused(image_path, vq_path, tmp_path, capsys):
    (tmp_path / "tars").mkdir()
    for name in ("tars/0.tar", "tars/1.tar", "images/stray.tar"):
        with tarfile.open(tmp_path / name, "w") as tar:
            tar.add(image_path / "a.png", "a.png")
    assert encode(tmp_path / "tars", vq_path, tmp_path / "codes") == 2
    assert "1.tar both hold a.png: rename it in one of them" in capsys.readouterr().err
    tar = str(tmp_path / "tars" / "0.tar")
    assert open_images([tar, tar]).keys() == ["a.png"]
    with tarfile.open(tmp_path / "dup.tar", "w") as file:
        for _ in range(2):
            file.add(image_path / "a.png", "a.png")
    assert encode(tmp_path / "dup.tar", vq_path, tmp_path / "codes") == 2
    assert "dup.tar holds a.png twice; make the tar again" in capsys.readouterr().err
    assert encode(image_path, vq_path, tmp_path / "codes") == 2
    assert "holds tar files (stray.tar) and images" in capsys.readouterr().err
    (image_path / "stray.tar").unlink()
    (tmp_path / "tars/b.parquet").write_bytes(b"x")
    assert encode(tmp_path / "tars", vq_path, tmp_path / "codes") == 2
    assert "b.parquet is a table and" in capsys.readouterr().err
    (tmp_path / "bad.tar").write_bytes(b"x" * 2000)
    assert encode(tmp_path / "bad.tar", vq_path, tmp_path / "codes") == 2
    assert "not a readable, uncompressed tar" in capsys.readouterr().err
    with tarfile.open(tmp_path / "two.tar", "w") as tar:
        for key in ("a.png", "b.png"):
            tar.add(image_path / "a.png", key)
    with tarfile.open(tmp_path / "two.tar") as tar:
        second = tar.getmembers()[1].offset
    whole = (tmp_path / "two.tar").read_bytes()
    flipped = bytearray(whole)
    flipped[second + 3] ^= 1
    for damaged in (flipped, whole[:second], whole[: second + 100]):
        (tmp_path / "bad.tar").write_bytes(damaged)
        assert encode(tmp_path / "bad.tar", vq_path, tmp_path / "codes") == 2
        assert f"the end of the tar at byte {second}); copy it again" in capsys.readouterr().err
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    assert encode(tmp_path / "empty.tar", vq_path, tmp_path / "codes") == 2
    assert "no images in there" in capsys.readouterr().err
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe\x00")
    assert encode(image_path, vq_path, tmp_path / "codes", list_path=tmp_path / "list.txt") == 2
    assert "is not UTF-8 text" in capsys.readouterr().err
    both = {"list_path": tmp_path / "list.txt", "json_path": tmp_path / "list.txt"}
    assert encode(image_path, vq_path, tmp_path / "codes", **both) == 2
    assert "give one of them" in capsys.readouterr().err


def test_keys_are_found_one_by_one(image_path, vq_path, tmp_path):
    assert encode(image_path, vq_path, tmp_path / "codes") == 0
    folder = CodeFolder(tmp_path / "codes")
    assert [folder.row(key) for key in sorted(KEYS)] == list(range(5))


@pytest.mark.parametrize(
    "launcher", [pytest.param("deepspeed", marks=pytest.mark.slow), "torchrun"]
)
def test_ranks_of_a_launcher_in_a_slurm_array_write_what_one_process_writes(
    image_path, vq_path, tmp_path, monkeypatch, launcher
):
    """The first of two array tasks is launched for real, with two ranks; the ranks of the second
    follow one after the other.
    """
    words = {
        "deepspeed": [
            "deepspeed",
            "--num_gpus",
            2,
            "--master_port",
            free_port(),
            "--module",
            "beingvl",
        ],
        "torchrun": [
            "torchrun",
            "--nproc-per-node",
            2,
            "--master-port",
            free_port(),
            "-m",
            "beingvl",
        ],
    }[launcher]
    words += [
        "encode-images",
        f"--image_path={image_path}",
        f"--vq_path={vq_path}",
        f"--output_path={tmp_path}/ranks",
    ]
    array = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "2"}
    done = subprocess.run(
        [*map(str, words), "--images_per_part=1"],
        env=ENVIRONMENT | array,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"rank {rank} of 4 has finished its parts" in done.stdout for rank in (0, 1)), (
        done.stdout + done.stderr
    )
    assert sorted(part.name for part in (tmp_path / "ranks").glob("parts.tmp/0*")) == [
        "00000",
        "00001",
        "00004",
    ]
    for rank in (0, 1):
        for name, value in (
            array | {"SLURM_ARRAY_TASK_ID": "2", "RANK": str(rank), "WORLD_SIZE": "2"}
        ).items():
            monkeypatch.setenv(name, value)
        assert encode(image_path, vq_path, tmp_path / "ranks", images_per_part=1) == 0
    assert (
        encode(image_path, vq_path, tmp_path / "one", images_per_part=5, rank=0, num_ranks=1) == 0
    )
    ranks, one = verify_folder(tmp_path / "ranks"), read_manifest(tmp_path / "one")
    assert ranks.content_hash == one.content_hash and ranks.details == one.details


def test_the_deepspeed_launcher_adds_an_option_in_front(capsys):
    assert main(["--local_rank=0", "--version"]) == 0 and "beingvl" in capsys.readouterr().out
