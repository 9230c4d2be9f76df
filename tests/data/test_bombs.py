"""What is small in a file and expands to more than memory or patience: a sentence, or a rejection
beside rows that stay.
"""

import io
import tarfile
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from beingvl import InputError
from beingvl.artefact.ranks import RankOf
from beingvl.data import collect_rows
from beingvl.images.encode_images import encode_images
from beingvl.images.image_source import MAX_FILE_BYTES, TarImages
from beingvl.images.vq_codes import REJECTED_FILE
from beingvl.sources import tables, text_tables
from beingvl.sources.tables import Table, key_of, python_bytes
from tests.data.forms import write_parquet
from tests.images.test_encode_images import save_vqgan


def png(side: int) -> bytes:
    file = io.BytesIO()
    Image.new("1", (side, side)).save(file, "PNG")
    return file.getvalue()


def test_a_picture_of_too_many_pixels_in_a_table_is_rejected(tmp_path: Path) -> None:
    rows = [{"image": {"bytes": png(side)}, "caption": "hi"} for side in (8, 20_000, 16)]
    table = write_parquet(tmp_path / "pictures", rows)
    assert table.stat().st_size < 200_000
    save_vqgan(tmp_path / "vqgan", seed=0)
    manifest = encode_images(table, tmp_path / "vqgan", tmp_path / "codes", max_rejected=0.5)
    assert manifest is not None and manifest.counts == {"images": 2, "rejected": 1}
    (line,) = (tmp_path / "codes" / REJECTED_FILE).read_text().splitlines()
    assert key_of(str(table), 1, 0) in line and "400000000 pixels" in line


def test_a_cell_that_many_rows_share_is_not_expanded(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tables, "MAX_GROWTH", 1 << 27)
    large = pa.array([bytes(1 << 24)])
    cells = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), large)
    path = tmp_path / "shared.parquet"
    options = {"compression": "zstd", "store_schema": False, "dictionary_pagesize_limit": 1 << 30}
    pq.write_table(pa.table({"image": cells}), path, **options)
    assert path.stat().st_size < 100_000
    with pytest.raises(InputError, match=r"shared\.parquet has rows that expand to gigabytes"):
        list(Table(str(path)).records())


def nulls(folder: Path, name: str, fields: list[str]) -> str:
    """A table of three rows, the second with a list of two million empty structs."""
    count = 2_000_000
    structs = pa.StructArray.from_arrays([pa.nulls(count + 1, pa.binary())] * len(fields), fields)
    lists = pa.ListArray.from_arrays(pa.array([0, 0, count, count + 1], pa.int32()), structs)
    path = folder / "nulls.parquet"
    pq.write_table(pa.table({name: lists, "caption": ["hi"] * 3}), path, compression="zstd")
    assert path.stat().st_size < 2000
    return str(path)


def test_a_row_of_very_many_pictures_is_rejected(tmp_path: Path) -> None:
    table = Table(nulls(tmp_path, "images", ["bytes", "path"]))
    tracemalloc.start()
    first, second, third = table.records()
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    assert first["images"] == [] and len(third["images"]) == 1
    assert second["unreadable"] == "2,000,000 pictures in a row, expected at most 10,000"
    keys = list(table.picture_keys())
    assert keys == [key_of(table.place, 1, 0), key_of(table.place, 2, 0)]
    with pytest.raises(InputError, match=r"nulls\.parquet#000000001/0: 2,000,000 pictures"):
        table.picture(1, 0)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_row_of_very_many_turns_is_rejected(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tables, "MAX_PYTHON", 1 << 27)
    first, second, third = Table(nulls(tmp_path, "texts", ["user", "assistant"])).records()
    assert first["texts"] == [] and len(third["texts"]) == 1
    assert second == {"unreadable": "it expands to more than 134,217,728 bytes"}


def test_rows_that_are_large_together_are_made_one_by_one(tmp_path: Path, monkeypatch) -> None:
    """None of them is too large alone; no more than two are there at a time, and a few first ones
    while the dialect is recognised.
    """
    monkeypatch.setattr(tables, "MAX_PYTHON", 1 << 26)
    count, num_rows = 100_000, 24
    structs = pa.StructArray.from_arrays([pa.nulls(count * num_rows)] * 2, ["user", "assistant"])
    lists = pa.ListArray.from_arrays(pa.array(range(0, count * num_rows + 1, count)), structs)
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"texts": lists}), path, compression="zstd")
    assert path.stat().st_size < 2000
    tracemalloc.start()
    assert [len(row["texts"]) for row in Table(str(path)).records()] == [count] * num_rows
    assert tracemalloc.get_traced_memory()[1] < 1 << 26
    collect_rows.open_rows(path, tmp_path / "rows", rank=RankOf(0, 1))
    assert tracemalloc.get_traced_memory()[1] < 1 << 27
    tracemalloc.stop()


VALUES = {
    "texts": pa.array(["x" * 2000 + "\N{OPEN BOOK}"] * 100),
    "texts by view": pa.array(["x" * 2000, None] * 100).cast(pa.string_view()),
    "cells that share a text": pa.array(["x" * 2000, None] * 100).dictionary_encode(),
    "bytes": pa.array([b"x" * 2000] * 100),
    "bytes by view": pa.array([b"x" * 2000] * 100).cast(pa.binary_view()),
    "empty texts": pa.array([""] * 1000),
    "empty lists": pa.array([[]] * 1000, pa.list_(pa.int8())),
    "empty structs": pa.array([{}] * 1000, pa.struct([])),
    "structs": pa.array([{"a": None}] * 1000),
    "maps": pa.array([[(1, 2)]] * 1000, pa.map_(pa.int32(), pa.int32())),
    "maps in a list": pa.array([[[(1, 2)]]] * 1000, pa.list_(pa.map_(pa.int32(), pa.int32()))),
    "fixed lists": pa.array([[1.5, 2.5]] * 1000, pa.list_(pa.float64(), 2)),
    "times": pa.array([1] * 1000, pa.timestamp("us", "UTC")),
}


@pytest.mark.parametrize("kind", [pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_large_cells_that_lie_in_one_buffer_are_read(tmp_path: Path, monkeypatch, kind) -> None:
    """Whose slices say that they are as large as all."""
    monkeypatch.setattr(tables, "MAX_PYTHON", 1 << 22)
    texts = [f"{number:05d}" * 40_000 for number in range(10)]
    batch = pa.record_batch([pa.array(texts).cast(kind)], names=["caption"])
    with (
        pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file,
        pa.ipc.new_stream(file, batch.schema) as out,
    ):
        out.write_batch(batch)
    rows = list(Table(str(tmp_path / "a.arrow")).records())
    assert [row["caption"] for row in rows] == texts


@pytest.mark.parametrize("name", VALUES)
def test_what_rows_take_in_python_is_known_beforehand(name: str) -> None:
    """Also of a slice, which shares its memory with the rest."""
    batch = pa.record_batch([VALUES[name]], names=["a"])
    half = batch.slice(len(batch) // 2)
    for rows in (batch, half):
        tracemalloc.start()
        made = rows.to_pylist()
        taken = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert len(made) == len(rows) and taken <= python_bytes(rows) + 5000
    assert python_bytes(half) < 0.6 * python_bytes(batch)


def test_a_text_that_expands_without_end(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(collect_rows, "BOMB_BYTES", 1 << 20)
    path = tmp_path / "rows.jsonl.zst"
    with pa.CompressedOutputStream(str(path), "zstd") as file:
        for _ in range(32):
            file.write(bytes(1 << 20))
    with pytest.raises(
        InputError, match=r"rows\.jsonl\.zst expands to more than 200 times its size"
    ):
        list(collect_rows.records_of(str(path)))


def test_a_table_of_one_endless_line(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(text_tables, "MAX_FIELD_CHARS", 1 << 16)
    path = tmp_path / "rows.csv"
    path.write_text("image,caption\na.png," + "hi " * (1 << 15))
    with pytest.raises(InputError, match="has a line of 65,536 characters or more"):
        list(collect_rows.records_of(str(path)))


def write_header(path: Path, kind: bytes, size: int) -> Path:
    """A tar of one member whose content is a hole."""
    member = tarfile.TarInfo("a.png")
    member.type, member.size = kind, size
    path.write_bytes(member.tobuf())
    with open(path, "r+b") as file:
        file.truncate(512 + (size + 1023) // 512 * 512)
    return path


def test_members_of_tars_that_are_too_large(tmp_path: Path) -> None:
    tar = write_header(tmp_path / "large.tar", tarfile.REGTYPE, MAX_FILE_BYTES + 1)
    with pytest.raises(InputError, match=r"a.png has 1,073,741,825 bytes, expected at most"):
        TarImages([tar]).read("a.png")
    tar = write_header(tmp_path / "note.tar", tarfile.XHDTYPE, 1 << 31)
    with pytest.raises(InputError, match="a note of 2,147,483,648 bytes"):
        TarImages([tar])
