"""Images from anywhere: what is damaged, hostile or odd is rejected by name, the rest is read."""

import io
import json
import os
import signal
import subprocess
import sys
import time
import zlib

import numpy as np
import psutil
import pytest
from PIL import Image

from beingvl.artefact.manifest import read_manifest
from beingvl.artefact.work import worker_processes
from beingvl.errors import InputError
from beingvl.images.decode import decode_image, read_image
from beingvl.images.vq_codes import CodeFolder
from beingvl.images.vqgan import VQGAN
from beingvl.inference.model import BeingVL
from tests.command import argv, beingvl
from tests.images.test_encode_images import save_vqgan
from tests.images.test_train_vq import SMALL


@pytest.fixture(scope="module")
def vq_path(tmp_path_factory):
    return save_vqgan(tmp_path_factory.mktemp("vq") / "vqgan", seed=0)


@pytest.fixture
def images(tmp_path):
    """A folder with one sound picture, ok.png."""
    (tmp_path / "images").mkdir()
    picture().save(tmp_path / "images/ok.png")
    return tmp_path / "images"


def picture(seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (24, 20, 3), dtype=np.uint8))


def encode(images, vq_path, output, **options):
    """What became of each image: its row of codes, or why it was rejected."""
    options = {"max_rejected": "100%"} | options
    options |= {"image_path": images, "vq_path": vq_path, "output_path": output}
    assert beingvl("encode-images", **options) == 0
    folder = CodeFolder(output)
    lines = (output / "rejected.jsonl").read_text().splitlines()
    rejected = {line["key"]: line["reason"] for line in map(json.loads, lines)}
    return {key: folder.codes[row] for row, key in enumerate(folder.keys)} | rejected


# ---- formats and decoders ----


def test_a_dds_named_png_is_rejected_by_name(images, vq_path, tmp_path):
    picture().save(images / "photo.dds")
    (images / "photo.dds").rename(images / "photo.png")
    found = encode(images, vq_path, tmp_path / "codes")
    assert "photo.png cannot be read as an image (it is in no known format" in found["photo.png"]


def test_postscript_named_png_starts_no_program(images, vq_path, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/gs").write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/started\nexit 1\n")
    (tmp_path / "bin/gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    picture().save(images / "photo.eps")
    (images / "photo.eps").rename(images / "photo.png")
    found = encode(images, vq_path, tmp_path / "codes")
    assert (
        "photo.png cannot be read as an image (it is in no known format: PNG," in found["photo.png"]
    )
    assert not (tmp_path / "started").exists() and len(found["ok.png"]) == 8


def damaged_avif() -> bytes:
    buffer = io.BytesIO()
    picture().save(buffer, "AVIF")
    data = buffer.getvalue()
    start = data.index(b"mdat") + 4
    return data[:start] + b"\xff" * (len(data) - start)


def big_endian_grey(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((9, 9), value, ">u2")).save(buffer, "TIFF")
    assert buffer.getvalue().startswith(b"MM")
    return buffer.getvalue()


def test_what_a_decoder_raises_rejects_that_image_by_name(images, vq_path, tmp_path, capsys):
    (images / "avif.jpg").write_bytes(damaged_avif())
    (images / "grey.tif").write_bytes(big_endian_grey(40000))
    (images / "dark.tif").write_bytes(big_endian_grey(200))
    Image.new("L", (9, 9), 200).save(images / "dark.png")
    found = encode(images, vq_path, tmp_path / "codes")
    assert "avif.jpg cannot be read as an image (RuntimeError" in found["avif.jpg"]
    assert "grey.tif has one value per pixel, from 40000 to 40000" in found["grey.tif"]
    assert (found["dark.tif"] == found["dark.png"]).all()  # 16 bits, but 8 of them used
    given = {"image_path": images, "vq_path": vq_path, "batch_size": 1}
    for share, exit_code in (("40%", 0), ("39%", 2)):
        options = {**given, "output_path": tmp_path / share, "max_rejected": share}
        assert beingvl("encode-images", **options) == exit_code
    assert "2 of 5 images rejected so far, --max_rejected is 0.39" in capsys.readouterr().err
    command = ["train-vq", f"--image_path={images}", f"--output_path={tmp_path}/vq", *SMALL]
    assert beingvl(*command) == 2
    (images / "avif.jpg").unlink()
    assert beingvl(*command) == 2
    assert "error: grey.tif has one value per pixel" in capsys.readouterr().err
    (images / "avif.jpg").write_bytes(damaged_avif())
    for name in ("avif.jpg", "grey.tif"):
        with pytest.raises(InputError, match=name):
            VQGAN.load(vq_path).preprocess([images / name])


@pytest.mark.parametrize(
    ("side", "suffix", "reason"),
    [
        (9000, "png", "81,000,000|9000 x 9000 pixels"),
        (20000, "png", "DecompressionBombError"),
        (20000, "gif", "DecompressionBombError"),
        (20000, "jpg", "DecompressionBombError"),
    ],
)
def test_a_bomb_is_rejected_before_it_is_decoded(images, vq_path, tmp_path, side, suffix, reason):
    picture().save(images / f"bomb.{suffix}")
    data = bytearray((images / f"bomb.{suffix}").read_bytes())
    if suffix == "png":
        data[16:24] = side.to_bytes(4, "big") * 2
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    elif suffix == "gif":
        data[6:10] = side.to_bytes(2, "little") * 2
    else:
        size = data.index(b"\xff\xc0") + 5
        data[size : size + 4] = side.to_bytes(2, "big") * 2
    (images / f"bomb.{suffix}").write_bytes(data)
    with pytest.raises(InputError, match=f"bomb.*({reason})"):
        read_image(images / f"bomb.{suffix}")


def test_a_jpeg_of_too_many_scans_is_rejected_before_it_is_decoded() -> None:
    """Two thousand scans, each of which goes through the whole picture in a few bytes."""
    buffer = io.BytesIO()
    Image.new("RGB", (2000, 2000)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    assert decode_image(data, "usual.jpg").size == (2000, 2000)
    last = data[data.rindex(b"\xff\xda") : -2]
    with pytest.raises(InputError, match=r"many\.jpg has 2000 x 2000 pixels, in 2010 scans"):
        decode_image(data[:-2] + 2000 * last + data[-2:], "many.jpg")


def test_a_png_with_a_huge_text_is_read(images, vq_path, tmp_path):
    data = (images / "ok.png").read_bytes()
    text = b"Comment\0\0" + zlib.compress(bytes(5 << 20))
    chunk = (
        len(text).to_bytes(4, "big")
        + b"zTXt"
        + text
        + zlib.crc32(b"zTXt" + text).to_bytes(4, "big")
    )
    (images / "before.png").write_bytes(data[:33] + chunk + data[33:])
    (images / "behind.png").write_bytes(data[:-12] + chunk + data[-12:])
    found = encode(images, vq_path, tmp_path / "codes")
    assert (found["before.png"] == found["ok.png"]).all()
    assert (found["behind.png"] == found["ok.png"]).all()


def test_warnings_of_decoders_name_the_image(images, vq_path, tmp_path, capfd):
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x09"
    picture().save(images / "exif.jpg", exif=exif)
    picture().save(images / "marker.tif", compression="jpeg")
    data = bytearray((images / "marker.tif").read_bytes())
    data[data.index(b"\xff\xda") + 20] = 0xFF
    data[data.index(b"\xff\xda") + 21] = 0xFC
    (images / "marker.tif").write_bytes(data)
    found = encode(images, vq_path, tmp_path / "codes", num_workers=1)
    error = capfd.readouterr().err
    assert len(found["exif.jpg"]) == len(found["marker.tif"]) == 8
    for warning in ("exif.jpg: Corrupt EXIF data", "marker.tif: JPEGLib: "):
        assert f"warning: {warning}" in error
    assert "UserWarning" not in error and not error.startswith("JPEGLib")


# ---- what lies in folders and tars ----


def test_only_regular_files_of_the_folder_are_opened(images, vq_path, tmp_path, capsys):
    os.mkfifo(images / "fifo.png")
    (images / "device.png").symlink_to("/dev/zero")
    picture().save(tmp_path / "secret.png")
    (images / "out.png").symlink_to("../secret.png")
    (images / "gone.png").symlink_to("nowhere.png")
    (images / "inside.png").symlink_to("ok.png")
    found = encode(images, vq_path, tmp_path / "codes")
    assert set(found) == {"ok.png", "inside.png"}
    said = f"{images}: 4 files left out (2 a link out of the image folder, 2 not a regular file)"
    assert said in capsys.readouterr().out
    (tmp_path / "list.txt").write_text("ok.png\nfifo.png\nout.png\ndevice.png\n")
    found = encode(images, vq_path, tmp_path / "named", list_path=tmp_path / "list.txt")
    assert "fifo.png is not a regular file; it was not opened" in found["fifo.png"]
    for key in ("out.png", "device.png"):
        assert f"{key} is a link out of the image folder; it was not opened" in found[key]


def test_linked_folders_are_followed_once(images, vq_path, tmp_path, capsys):
    for name in ("real/deep", "images/sub"):
        (tmp_path / name).mkdir(parents=True)
        picture().save(tmp_path / name / "a.png")
    (images / "coco").symlink_to("../real")
    (images / "again").symlink_to("sub")
    (images / "sub/loop").symlink_to("..")
    (images / "up").symlink_to("/")
    (tmp_path / "real/back").symlink_to("../images")
    (images / "self.png").symlink_to("self.png")
    found = encode(images, vq_path, tmp_path / "codes")
    assert set(found) == {"ok.png", "sub/a.png", "coco/deep/a.png"}
    said = capsys.readouterr().out
    assert "2 linked folders seen before" in said and "2 linked folders around themselves" in said


def test_what_is_left_out_is_counted_and_said(images, vq_path, tmp_path, capsys):
    for name in ("a.txt", "b.TXT", "c.heic", "README", "._ok.png"):
        (images / name).write_text("none")
    (images / ".cache").mkdir()
    encode(images, vq_path, tmp_path / "codes")
    said = "6 files left out (2 .txt, 2 hidden, 1 .heic, 1 without suffix)"
    assert f"{images}: {said}" in capsys.readouterr().out


def test_members_of_a_tar_that_are_left_out_or_rejected(images, vq_path, tmp_path, capsys):
    with open(images / "holes.png", "wb") as file:
        file.seek(1 << 20)
        file.write(b"end")
    (images / "._ok.png").write_bytes(b"AppleDouble")
    (images / "link.png").symlink_to("ok.png")
    (images / "label.txt").write_text("7")
    subprocess.run(["tar", "--sparse", "-cf", tmp_path / "a.tar", "-C", images, "."], check=True)
    found = encode(tmp_path / "a.tar", vq_path, tmp_path / "codes")
    assert set(found) == {"ok.png", "holes.png"} and len(found["ok.png"]) == 8
    assert "holds it as a sparse file; make it without --sparse" in found["holes.png"]
    said = capsys.readouterr().out
    assert "a.tar: 3 files left out (" in said and "1 hidden" in said and "1 .txt" in said


# ---- orientation ----


def test_pictures_are_turned_as_viewers_do_unless_exif_is_ignored(images, vq_path, tmp_path):
    note = Image.Exif()
    note[0x112] = 6
    picture().save(images / "phone.png", exif=note)
    picture().transpose(Image.Transpose.ROTATE_270).save(images / "viewed.png")
    turned = encode(images, vq_path, tmp_path / "turned")
    stored = encode(images, vq_path, tmp_path / "stored", exif="ignore")
    assert (turned["phone.png"] == turned["viewed.png"]).all()
    assert (stored["phone.png"] == stored["ok.png"]).all()
    for key in ("ok.png", "viewed.png"):  # codes of images without orientation keep their bytes
        assert (turned[key] == stored[key]).all()
    assert read_manifest(tmp_path / "turned").lineage["exif"] == "apply"
    assert read_manifest(tmp_path / "stored").lineage["exif"] == "ignore"
    options = {"image_path": images, "vq_path": vq_path, "output_path": tmp_path / "stored"}
    assert beingvl("encode-images", **options) == 2


def test_a_model_reads_images_as_its_data_was_read(run_folder):
    model = BeingVL(run_folder / "stage-3" / "final")
    assert model.vqgan.preprocessing.exif == "ignore"  # data of before the option
    model.manifest.lineage["exif"] = "apply"
    del model.vqgan
    assert model.vqgan.preprocessing.exif == "apply"


# ---- workers ----


@pytest.mark.needs_root
def test_workers_need_no_room_in_dev_shm(images, vq_path, tmp_path):
    paths = {"image_path": images, "vq_path": vq_path, "output_path": tmp_path / "codes"}
    words = argv("encode-images", **paths, num_workers=2)
    small = 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"'
    command = ["unshare", "-m", "sh", "-c", small, "sh", sys.executable, "-m", "beingvl", *words]
    subprocess.run(command, check=True, timeout=120)
    assert CodeFolder(tmp_path / "codes").manifest.counts == {"images": 1, "rejected": 0}


def test_a_worker_of_any_step_that_the_kernel_kills_is_named():
    killed = pytest.raises(InputError, match=r"a worker process was killed .*fewer --num_workers")
    with killed, worker_processes(1, os.getpid) as pool:
        pool.submit(signal.raise_signal, signal.SIGKILL).result()


def test_a_worker_that_the_kernel_kills_is_named(images, vq_path, tmp_path):
    for number in range(400):
        (images / f"{number}.png").hardlink_to(images / "ok.png")
    paths = {"image_path": images, "vq_path": vq_path, "output_path": tmp_path / "codes"}
    words = argv("encode-images", **paths, num_workers=1, batch_size=1)
    with subprocess.Popen(
        [sys.executable, "-m", "beingvl", *words], stderr=subprocess.PIPE, text=True
    ) as run:
        while not (workers := psutil.Process(run.pid).children()):
            assert run.poll() is None
            time.sleep(0.01)
        workers[0].kill()
        error = run.communicate(timeout=60)[1]
    assert run.returncode == 2 and "a worker process was killed (DataLoader worker (pid" in error
    assert "when memory ran out; nothing finished is lost" in error
