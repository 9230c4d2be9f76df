"""The same rows in every dialect and container, written as other people's tools write them."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

QUESTION = "Describe the image."


class Fact(NamedTuple):
    """One picture and one answer about it: what every form of a row says."""

    number: int
    png: bytes
    answer: str

    @property
    def file(self) -> str:
        return f"{self.number:06d}.png"


# ---- dialects: a fact, and what stands for its picture ----


def llava(fact: Fact, picture: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}]
    turns.append({"from": "gpt", "value": fact.answer})
    return {"id": str(fact.number), "image": picture, "conversations": turns}


def sharegpt(fact: Fact, picture: Any) -> dict[str, Any]:
    turns = [{"from": "user", "value": f"<image>{QUESTION}"}]
    turns.append({"from": "assistant", "value": fact.answer})
    return {"conversations": turns, "images": [picture]}


def messages(fact: Fact, picture: Any) -> dict[str, Any]:
    parts = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    told = [{"role": "user", "content": parts}, {"role": "assistant", "content": fact.answer}]
    return {"messages": told, "images": [picture]}


def messages_of_texts(fact: Fact, picture: Any) -> dict[str, Any]:
    """In a table all messages have the same type."""
    told = [{"role": "user", "content": f"<image>{QUESTION}"}]
    return {"messages": [*told, {"role": "assistant", "content": fact.answer}], "images": [picture]}


def texts(fact: Fact, picture: Any) -> dict[str, Any]:
    return {"images": [picture], "texts": [{"user": QUESTION, "assistant": fact.answer}]}


def caption(fact: Fact, picture: Any) -> dict[str, Any]:
    return {"image": picture, "caption": fact.answer}


def alpaca(fact: Fact, picture: Any) -> dict[str, Any]:
    return {"instruction": QUESTION, "input": "", "output": fact.answer, "images": [picture]}


DIALECTS = {"llava": llava, "sharegpt": sharegpt, "messages": messages, "texts": texts}
DIALECTS |= {"caption": caption, "alpaca": alpaca}


# ---- containers ----


def write_pictures(folder: Path, facts: Sequence[Fact]) -> None:
    """A folder of the facts' pictures."""
    folder.mkdir()
    for fact in facts:
        (folder / fact.file).write_bytes(fact.png)


def write_text(path: Path, records: Sequence[dict], kind: str) -> Path:
    """Rows as `kind` says: a format, and how it is compressed, as "jsonl.gz"."""
    path = path.with_suffix(f".{kind}")
    form, _, compressed = kind.partition(".")
    opener = {"": open, "gz": gzip.open, "zst": _open_zst}[compressed]
    with opener(path, "wt", newline="") as file:
        if form == "json":
            file.write(json.dumps(records))
        elif form in ("jsonl", "ndjson"):
            file.writelines(json.dumps(record) + "\n" for record in records)
        else:
            delimiter = {"csv": ",", "tsv": "\t"}[form]
            table = csv.DictWriter(file, list(records[0]), delimiter=delimiter)
            table.writeheader()
            table.writerows(records)
    return path


def _open_zst(path: Path, _: str, newline: str) -> IO[str]:
    return io.TextIOWrapper(pa.CompressedOutputStream(str(path), "zstd"), newline=newline)


write_json = partial(write_text, kind="json")
write_jsonl = partial(write_text, kind="jsonl")
write_jsonl_gz = partial(write_text, kind="jsonl.gz")
write_csv = partial(write_text, kind="csv")
JSON = ("json", "json.gz", "json.zst", "jsonl", "jsonl.gz", "jsonl.zst", "ndjson")
DELIMITED = ("csv", "csv.gz", "csv.zst", "tsv")  # for dialects whose fields are texts


def write_parquet(path: Path, records: Sequence[dict]) -> Path:
    path = path.with_suffix(".parquet")
    pq.write_table(pa.Table.from_pylist(list(records)), path, row_group_size=100)
    return path


def write_arrow(path: Path, records: Sequence[dict]) -> Path:
    """A folder as `datasets.save_to_disk` leaves it."""
    path.mkdir()
    table = pa.Table.from_pylist(list(records))
    name = str(path / "data-00000-of-00001.arrow")
    with pa.OSFile(name, "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
        out.write_table(table, max_chunksize=50)
    (path / "state.json").write_text("{}")
    (path / "dataset_info.json").write_text("{}")
    return path


TABLES = {"parquet": write_parquet, "arrow": write_arrow}


def write_tar(path: Path, facts: Sequence[Fact], dialect: Callable | None) -> Path:
    """Pairs: .png beside .json, or beside .txt without a dialect."""
    path = path.with_suffix(".tar")
    with tarfile.open(path, "w") as tar:
        for fact in facts:
            stem = fact.file.removesuffix(".png")
            beside = (f"{stem}.txt", fact.answer)
            if dialect:
                beside = f"{stem}.json", json.dumps(dialect(fact, fact.file))
            for name, data in ((fact.file, fact.png), (beside[0], beside[1].encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def every_form(folder: Path, facts: Sequence[Fact]) -> Iterator[tuple[str, Path, bool]]:
    """(name, path or pattern, whether pictures are inside) of the facts in every dialect and
    container that can hold it.
    """
    named = {name: [form(fact, fact.file) for fact in facts] for name, form in DIALECTS.items()}
    for name, records in named.items():
        for kind in JSON:
            yield f"{name} {kind}", write_text(folder / f"{name}-{kind}", records, kind), False
    flat = [{**row, "image": row["images"][0]} for row in named["alpaca"]]
    flat = [{key: row[key] for key in ("instruction", "input", "output", "image")} for row in flat]
    for name, records in (("caption", named["caption"]), ("alpaca", flat)):
        for kind in DELIMITED:
            yield f"{name} {kind}", write_text(folder / f"{name}-{kind}", records, kind), False
    for name, form in {**DIALECTS, "messages": messages_of_texts}.items():
        inside = [form(fact, {"bytes": fact.png, "path": fact.file}) for fact in facts]
        for container, write in TABLES.items():
            yield f"{name} {container}", write(folder / f"{name}-{container}", inside), True
        yield f"{name} tar", write_tar(folder / f"{name}-pairs", facts, form), True
    yield "caption tar of texts", write_tar(folder / "texts-pairs", facts, None), True
    half = len(facts) // 2
    (folder / "two").mkdir()
    write_jsonl(folder / "two" / "0", named["messages"][:half])
    write_jsonl(folder / "two" / "1", named["caption"][half:])
    yield "a folder of messages and captions", folder / "two", False
    for number, part in enumerate((facts[:half], facts[half:])):
        write_tar(folder / f"{number}-of-2", part, caption)
    yield "a pattern of tars", folder / "*-of-2.tar", True
