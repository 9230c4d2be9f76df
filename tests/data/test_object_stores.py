"""Rows and pictures at addresses, over a bad connection: the bytes of local files."""

import gzip
import io
import json
import math
import multiprocessing
import random
import signal
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from beingvl import InputError, tokenize
from beingvl.artefact.manifest import MANIFEST_FILE, is_complete, read_manifest, write_manifest
from beingvl.artefact.ranks import RankOf
from beingvl.commands.main import main
from beingvl.data import collect_rows
from beingvl.data.collect_rows import SUFFIXES, open_rows, records_of
from beingvl.evaluation.evaluate import evaluate
from beingvl.images import decode
from beingvl.images.decode import picture_of
from beingvl.images.encode_images import encode_images
from beingvl.images.image_source import open_images
from beingvl.images.train_vq import train_vq
from beingvl.sources import places
from beingvl.sources.places import expand, opened
from beingvl.sources.tables import Table
from beingvl.vocab import VocabLayout
from tests.data import forms
from tests.data.forms import Fact
from tests.data.test_forms import png
from tests.images.test_encode_images import save_vqgan
from tests.object_store import BUCKET, Store, store
from tests.tiny import write_model

__all__ = ["store"]  # a fixture


FACTS = [Fact(number, png(number), f"hi {'yes ' * (number % 3)}no") for number in range(12)]


def inside(dialect) -> list[dict]:
    return [dialect(fact, {"bytes": fact.png, "path": fact.file}) for fact in FACTS]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "base"
    layout = VocabLayout(num_text=258, num_vq=32, num_merges=8, bos_id=256, eos_id=257)
    write_model(folder, layout)
    save_vqgan(folder / "vqgan", seed=0)
    lineage = {**read_manifest(folder / "vqgan").lineage, "vocab": layout.fingerprint()}
    write_manifest(folder, "model", {}, lineage)
    return folder


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """The facts in four containers, and a folder of their pictures."""
    folder = tmp_path_factory.mktemp("here")
    forms.write_pictures(folder / "pictures", FACTS)
    forms.write_jsonl_gz(folder / "rows", [forms.llava(fact, fact.file) for fact in FACTS])
    forms.write_parquet(folder / "table", inside(forms.texts))
    forms.write_arrow(folder / "saved", inside(forms.sharegpt))
    forms.write_tar(folder / "pairs", FACTS, None)
    return folder


@pytest.fixture(scope="module")
def there(here: Path, store: Store) -> Store:
    for path in here.iterdir():
        store.put(path)
    return store


@pytest.fixture
def quick(monkeypatch) -> Iterator[None]:
    """Small ranges, so that there are many; short pauses between many tries."""
    monkeypatch.setattr(places, "BLOCK_BYTES", 1 << 10)
    monkeypatch.setattr(places, "PAUSES_SECONDS", (0.01,) * 8)
    yield


def written(folder: Path) -> dict[str, bytes]:
    """All files below it but manifests."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST_FILE
    }


def tokenized(base: Path, root: str, name: str, output: Path, **more) -> dict[str, bytes]:
    images = f"{root}/pictures" if name.startswith("rows") else None
    out = output / "out"
    tokenize(f"{root}/{name}", base, out, image_path=images, format="arrow", **more)
    return written(output)


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "table.parquet", "saved", "pairs.tar"])
def test_a_bad_connection_loses_no_row(base, here, there, quick, tmp_path, name, capsys) -> None:
    local = tokenized(base, str(here), name, tmp_path / "local")
    with there.bad(rate=0.15, seed=len(name)):
        far = tokenized(base, f"s3://{BUCKET}", name, tmp_path / "far")
    assert far == local and len(far) > 5
    faults = sum(there.faults[fault] for fault in there.faults if fault)
    assert faults and 0 < capsys.readouterr().err.count("asked again") <= faults


def test_evaluate_and_train_vq_read_pictures_there(base, here, there, quick, tmp_path) -> None:
    rows = [{**forms.llava(fact, fact.file), "answer": "yes"} for fact in FACTS[:4]]
    forms.write_json(tmp_path / "questions", rows)
    places = {"here": str(here / "pictures"), "there": f"s3://{BUCKET}/pictures"}
    for name, images in places.items():
        asked = {"max_new_tokens": 2, "image_path": images, "raw": True, "name": "x"}
        evaluate(base, tmp_path / name, json_path=tmp_path / "questions.json", **asked)
        sizes = {"image_size": 8, "grid": 4, "num_codes": 4, "base_channels": 32}
        train_vq(images, tmp_path / f"vqgan-{name}", steps=2, **sizes)
    assert written(tmp_path / "there") == written(tmp_path / "here")
    assert written(tmp_path / "vqgan-there") == written(tmp_path / "vqgan-here")


def test_rows_of_a_parquet_take_fewer_bytes_than_it_has(store, tmp_path) -> None:
    pictures = [random.Random(number).randbytes(1 << 17) for number in range(80)]
    rows = [forms.caption(FACTS[0], {"bytes": picture, "path": None}) for picture in pictures]
    path = forms.write_parquet(tmp_path / "large", rows)
    address, before = store.put(path), store.bytes
    assert len(list(records_of(address))) == 80
    assert store.bytes - before < path.stat().st_size / 4


def test_cut_containers_there(here, store, quick) -> None:
    for path in (here / "pairs.tar", here / "saved" / "data-00000-of-00001.arrow"):
        data = path.read_bytes()
        cut = data.index(b"hi", len(data) // 3) + 1 if path.suffix == ".tar" else -8
        address = address_of(store, f"cut/{path.name}", data[:cut])
        with pytest.raises(InputError, match="copy it again"):
            list(records_of(address))


# ---- what changes, vanishes, or is not given ----


def address_of(store: Store, name: str, data: bytes) -> str:
    store.files().pipe(f"{BUCKET}/{name}", data)
    return f"s3://{BUCKET}/{name}"


def test_an_object_that_changes_or_vanishes_between_two_reads(store, quick) -> None:
    address = address_of(store, "changing.bin", bytes(10_000))
    file, other = opened(address), opened(address)
    assert file.read(5000) == bytes(5000)
    address_of(store, "changing.bin", bytes(10_001))
    with pytest.raises(FileNotFoundError, match="changed while it was read"):
        file.read(5000)
    store.files().rm(f"{BUCKET}/changing.bin")
    with pytest.raises(FileNotFoundError, match="it is not there"):
        other.read(5000)


@pytest.mark.parametrize("name", ["table.parquet", "pairs.tar", "pictures"])
def test_a_lost_connection_or_right_is_no_damaged_picture(there, quick, name) -> None:
    for fault, error in (("403", PermissionError), ("503", ConnectionAbortedError)):
        images = open_images([f"s3://{BUCKET}/{name}"])
        key = images.keys()[-1]
        there.always = fault
        try:
            with pytest.raises(error):
                images.read(key)
        finally:
            there.always = ""
        assert images.read(key) == FACTS[-1].png


def test_what_changed_between_two_starts_is_named(here, there, quick, base, tmp_path) -> None:
    """Of pictures that are half encoded, and of rows that are collected."""
    source = address_of(there, "again/table.parquet", (here / "table.parquet").read_bytes())

    def encode(rank: int) -> None:
        parts = {"images_per_part": 8, "rank": rank, "num_ranks": 2}
        encode_images(source, base / "vqgan", tmp_path / "codes", **parts)

    encode(0)
    open_rows(source, tmp_path / "rows", rank=RankOf(0, 1))
    forms.write_parquet(tmp_path / "other", inside(forms.texts)[::-1])
    address_of(there, "again/table.parquet", (tmp_path / "other.parquet").read_bytes())
    with pytest.raises(InputError, match=r"different content of s3://bucket/again/table.parquet"):
        encode(1)
    with pytest.raises(InputError, match=r"finished, but with different files .*table\.parquet"):
        open_rows(source, tmp_path / "rows", rank=RankOf(0, 1))


def test_a_listing_that_changes(there, quick, tmp_path) -> None:
    folder = f"s3://{BUCKET}/growing"
    line = json.dumps(forms.caption(FACTS[0], FACTS[0].file)).encode()
    address_of(there, "growing/0.jsonl", line)
    open_rows(folder, tmp_path / "rows", rank=RankOf(0, 1))
    address_of(there, "growing/1.jsonl", line)
    with pytest.raises(InputError, match=r"different files .*growing/1\.jsonl"):
        open_rows(folder, tmp_path / "rows", rank=RankOf(0, 1))


def test_a_folder_of_img2dataset_there(here, there, capsys) -> None:
    folder = f"s3://{BUCKET}/img2dataset"
    tar = address_of(there, "img2dataset/0.tar", (here / "pairs.tar").read_bytes())
    for name in ("0.parquet", "0_stats.json"):
        address_of(there, f"img2dataset/{name}", b"{}")
    assert expand([folder], SUFFIXES) == [tar]
    assert open_images([folder]).keys() == [fact.file for fact in FACTS]
    assert capsys.readouterr().out.count("left out 2 of img2dataset's files") == 2


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("s3://bucket/none.jsonl", "is not there, or holds no file"),
        ("gs://bucket/rows.jsonl", "pip install '.[remote]'"),  # which no test installs
        ("nobody://bucket/rows.jsonl", "Protocol not known"),
        ("https://127.0.0.1:1/*.jsonl", "does not list its files"),
        ("https://127.0.0.1:1/rows.jsonl", "check the network and start the same command again"),
    ],
)
def test_one_sentence_for(base, store, quick, tmp_path, capsys, address, said) -> None:
    assert main(tokenize_words(address, base, tmp_path / "out")) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_missing_credentials_are_said(base, there, quick, tmp_path, capsys) -> None:
    words = tokenize_words(f"s3://{BUCKET}/rows.jsonl.gz", base, tmp_path / "out")
    there.always = "403"
    try:
        assert main(words) == 2
    finally:
        there.always = ""
    assert "credentials are missing" in capsys.readouterr().err


def test_a_wrong_profile_is_not_tried_again(store, tmp_path, monkeypatch) -> None:
    kind = fsspec.get_filesystem_class("s3")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    kind.clear_instance_cache()
    try:
        before = store.requests
        with pytest.raises(PermissionError, match=r"missing or wrong .*\(nobody\) could not be"):
            opened(f"s3://{BUCKET}/rows.jsonl")
        assert store.requests == before
    finally:
        kind.clear_instance_cache()


# ---- https ----


def test_a_web_server(here, there, quick) -> None:
    """With a query behind the name, without ranges, without a size."""
    expected = (here / "rows.jsonl.gz").read_bytes()
    address = f"{there.url}/{BUCKET}/rows.jsonl.gz?download=true"
    large = address_of(there, "large", bytes(100_000)).replace("s3:/", there.url)
    rows = [row["conversations"][1]["value"] for row in records_of(address)]
    assert rows == [fact.answer for fact in FACTS]
    with there.bad(rate=0.15):
        assert opened(address).read() == expected
    there.always = "no size"
    try:
        assert opened(address).read() == expected
        there.always = "no ranges"
        with pytest.raises(FileNotFoundError, match="range requests"):
            opened(large).read()
    finally:
        there.always = ""


def tar_of(*members: tuple[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def parquet_of(**columns: list) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


def collect(addresses: list[str], folder: Path) -> None:
    open_rows(addresses, folder, rank=RankOf(0, 1))


def look(addresses: list[str], folder: Path) -> None:
    open_images(addresses).keys()


def show(addresses: list[str], folder: Path) -> None:
    picture_of(addresses[0], "")


def read_a_sixth_row(addresses: list[str], folder: Path) -> None:
    Table(addresses[0]).picture(5, 0)


CAPTION = b'{"image": "a.png", "caption": "hi"}\n'
PAIR = tar_of(("a.png", b""), ("a.txt", b"hi"))
SIGNED = {
    "are files of two kinds": (collect, {"a.csv": b"", "b.tsv": b""}),
    "expected a name that ends in": (collect, {"a.doc": b""}),
    "row 1: line 1 is not valid JSON": (collect, {"a.jsonl": b"nothing"}),
    "line 1: an object spans several lines": (collect, {"a.json": b"{\n}"}),
    "holds no row, expected a non-empty list": (collect, {"a.json": b"[]"}),
    "has rows with the keys": (collect, {"a.jsonl": b'{"a": 1}'}),
    "mixes rows of caption and texts": (collect, {"a.jsonl": CAPTION + b'{"texts": []}'}),
    "is truncated or damaged": (collect, {"a.jsonl.gz": gzip.compress(CAPTION)[:-5]}),
    "expands to more than 200 times": (collect, {"a.csv.gz": gzip.compress(bytes(1 << 20))}),
    "has one column": (collect, {"a.csv": b"image;caption\n"}),
    "has two columns of one name: .'a', 'a'": (collect, {"a.csv": b"a,a\n"}),
    "line 3: unexpected end of data": (collect, {"a.csv": b'image,caption\n"a'}),
    "holds no .json or .txt": (collect, {"a.tar": tar_of(("a.png", b""))}),
    "is not a readable, uncompressed tar": (collect, {"a.tar": PAIR[:600]}),
    "a.tar and .*b.tar both hold a.png": (collect, {"a.tar": PAIR, "b.tar": PAIR}),
    "a.tar and .*/b.tar both hold a.png": (look, {"a.tar": PAIR, "b.tar": PAIR}),
    "holds a.png twice": (look, {"a.tar": tar_of(("a.png", b""), ("a.png", b""))}),
    "no images in there": (look, {"a.tar": tar_of(("a.txt", b""))}),
    "a.parquet is a table and .*a.tar is not": (look, {"a.parquet": b"", "a.tar": PAIR}),
    "is not a folder and not a tar file": (look, {"a.tar": PAIR, "a.png": b""}),
    "has no column of pictures": (look, {"a.parquet": parquet_of(a=[1])}),
    "is not a whole parquet file": (look, {"a.parquet": b"nothing"}),
    "has no row 5": (read_a_sixth_row, {"a.parquet": parquet_of(a=[b""])}),
    "cannot be read as an image": (show, {"a.png": b"nothing"}),
    "has more than 1,024 bytes": (show, {"a.png": bytes(1025)}),
}


@pytest.mark.parametrize("said", SIGNED)
def test_no_sentence_shows_a_signature(store, monkeypatch, tmp_path, capsys, said) -> None:
    monkeypatch.setattr(collect_rows, "BOMB_BYTES", 1)
    monkeypatch.setattr(decode, "MAX_FILE_BYTES", 1024)
    call, files = SIGNED[said]
    stored = [address_of(store, f"signed/{name}", data) for name, data in files.items()]
    addresses = [f"{address.replace('s3:/', store.url)}?sig=SECRET" for address in stored]
    with pytest.raises(InputError, match=said) as error:
        call(addresses, tmp_path / "rows")
    assert "SECRET" not in f"{error.value}{capsys.readouterr()}"


# ---- kills ----


def tokenize_words(address: str, base: Path, output: Path) -> list[str]:
    named = [f"--json_path={address}", f"--model={base}", f"--output={output}"]
    return ["tokenize", *named, "--format=arrow", "--rows_per_part=8", "--num_workers=0"]


def run_quickly(words: list[str]) -> None:
    places.PAUSES_SECONDS = (0.01,) * 30  # type: ignore[assignment]
    sys.exit(main(words))


def start_quickly(words: list[str]) -> ForkServerProcess:
    """In a fork of a process that has imported everything, so that kills hit work."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload([__name__, "s3fs"])
    process = forks.Process(target=run_quickly, args=[words])
    process.start()
    return process


@pytest.mark.slow
def test_thirty_kills_over_a_bad_connection(base, here, there, tmp_path) -> None:
    """Each while some request is under way; in the end all has the bytes of local files."""
    (tmp_path / "many").mkdir()
    for number in range(6):
        part = inside(forms.texts)[number::6]
        forms.write_parquet(tmp_path / "many" / str(number), part)
    address = there.put(tmp_path / "many")
    assert main(tokenize_words(str(tmp_path / "many"), base, tmp_path / "local" / "out")) == 0
    expected = written(tmp_path / "local")
    moments, most, finished = random.Random(0), 0, 0
    kills, faults = Counter[str](), Counter[str]()
    while kills.total() < 30:
        output = tmp_path / f"far-{finished}"
        with there.bad(rate=0.1, seed=kills.total()):
            before = there.requests
            process = start_quickly(tokenize_words(address, base, output / "out"))
            last = before + moments.randrange(most) if most else math.inf
            while process.is_alive() and there.requests <= last:
                time.sleep(0.001)
            process.kill()
            process.join()
            most = most or there.requests - before  # the first start goes on to its end
            faults += there.faults
        assert process.exitcode in (0, -signal.SIGKILL)
        if process.exitcode:
            kills["collecting" if not is_complete(output / "out_data_rows") else "encoding"] += 1
        else:
            assert written(output) == expected
            finished += 1
    print(f"killed while {dict(kills)}, {finished} finished outputs, requests {dict(faults)}")
    assert kills["collecting"] and kills["encoding"]
    with there.bad(rate=0.1):
        process = start_quickly(tokenize_words(address, base, output / "out"))
        process.join()
    assert process.exitcode == 0 and written(output) == expected
