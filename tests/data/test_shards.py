"""Arrow shards, JSONL -> shards, and the loader's batches."""

import errno
import json
import resource
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from beingvl.artefact.manifest import read_manifest, write_manifest
from beingvl.commands import main as cli
from beingvl.data import shard_writer
from beingvl.data.arrow_shards import ShardReader
from beingvl.data.loader import IGNORED, Share, TrainingData, collate, open_mixture, shifted_targets
from beingvl.data.mixture import Mixture
from beingvl.data.shard_columns import Sample, ShardFacts, map_batch
from beingvl.data.shard_writer import ShardWriter
from beingvl.errors import InputError
from beingvl.vocab import TOKEN_KINDS, VocabLayout
from tests.command import beingvl
from tests.damage import change_manifest, list_anew
from tests.tiny import LAYOUT, write_model, write_shards


def sample(ids, spans, name="s", category="foundation") -> Sample:
    return Sample(
        name, "", category, np.array(ids, np.int32), np.array(spans, np.int32).reshape(-1, 2)
    )


def test_what_was_written_is_read(tmp_path) -> None:
    random = np.random.default_rng(0)
    written = []
    writer = ShardWriter(tmp_path, LAYOUT, rows_per_shard=7)
    for number in range(20):
        ids = random.integers(0, LAYOUT.size, random.integers(3, 30))
        written.append(sample(ids, [(1, 2), (2, len(ids))], f"id {number} é", "abc"[number % 3]))
        writer.add(written[-1])
    writer.finish({"vocab": LAYOUT.fingerprint()}, {})
    reader = ShardReader(tmp_path)
    assert len(reader) == 20 and reader.layout == LAYOUT
    for expected, index in zip(written, range(20), strict=True):
        found = reader[index]
        assert (found.id, found.category) == (expected.id, expected.category)
        assert found.input_ids.tolist() == expected.input_ids.tolist()
        assert found.target_spans.tolist() == expected.target_spans.tolist()
    assert reader.lengths.tolist() == [len(entry.input_ids) for entry in written]
    assert [reader.sources[source] for source in reader.source_of] == [
        entry.category for entry in written
    ]


def test_shards_are_read_in_the_order_they_were_written(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(
        shard_writer, "shard_name", lambda number: f"shard-{99_999 + number:05d}.arrow"
    )
    writer = ShardWriter(tmp_path, LAYOUT, rows_per_shard=1)
    for number in range(3):
        writer.add(sample([1, 2, *range(number)], [], f"s{number}"))
    writer.finish({}, {})
    reader = ShardReader(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.arrow"))[0] == "shard-100000.arrow"
    assert [reader[number].id for number in range(3)] == ["s0", "s1", "s2"]


def test_samples_are_views_into_the_memory_map(tmp_path) -> None:
    reader = ShardReader(write_shards(tmp_path))
    assert not reader[0].input_ids.flags.owndata


@pytest.mark.parametrize(
    ("ids", "spans", "message"),
    [
        ([], [], "no tokens"),
        ([1, LAYOUT.size], [], f"has id {LAYOUT.size}"),
        ([-1, 2], [], "vocabulary"),
        ([1, 2], [(1, 3)], "target_spans"),
        ([1, 2], [(0, 1)], "target_spans"),
        ([1, 2, 3], [(1, 3), (2, 3)], "overlapping"),
    ],
)
def test_impossible_samples_are_refused(tmp_path, ids, spans, message) -> None:
    writer = ShardWriter(tmp_path, LAYOUT)
    writer.add(sample([1, 2], [(1, 2)]))
    writer.add(sample(ids, spans, "bad"))
    with pytest.raises(InputError, match=f"sample 'bad' .*{message}"):
        writer.finish({}, {})


def test_no_sample_at_all(tmp_path) -> None:
    with pytest.raises(InputError, match="no sample"):
        ShardWriter(tmp_path, LAYOUT).finish({}, {})


def test_a_shard_is_mapped_or_refused(tmp_path) -> None:
    write_shards(tmp_path)
    path = tmp_path / "shard-00001.arrow"
    (_, batch), data = map_batch(path), path.read_bytes()
    assert batch.num_rows and batch.equals(pa.ipc.open_file(data).get_batch(0))
    for damaged in (b"", data[:-10], b"x" * len(data)):
        path.with_name("damaged.arrow").write_bytes(damaged)
        with pytest.raises(InputError, match="not a readable Arrow file"):
            map_batch(path.with_name("damaged.arrow"))


def test_damaged_shards_are_refused(tmp_path) -> None:
    write_shards(tmp_path)
    path = tmp_path / "shard-00001.arrow"
    data = path.read_bytes()
    path.write_bytes(data[:-10])
    with pytest.raises(InputError, match="build the shards again"):
        ShardReader(tmp_path)
    path.write_bytes(b"x" * len(data))
    with pytest.raises(InputError, match="not a readable Arrow file"):
        ShardReader(tmp_path)[32]
    path.unlink()
    with pytest.raises(InputError, match="no such file"):
        ShardReader(tmp_path)


def test_fewer_samples_than_the_manifest_says(tmp_path) -> None:
    write_shards(tmp_path)
    change_manifest(tmp_path, counts={"samples": 61})
    with pytest.raises(InputError, match="holds 60 samples, its manifest says 61"):
        ShardReader(tmp_path)


# ---- JSONL -> shards ----

ROW = {
    "id": 7,
    "category": "foundation",
    "token_0": [256, 262],
    "token_image": [263, 264],
    "token_1": [260, 5, 259, 6, 257],
}


def build_shards(tmp_path, rows, **options: object) -> int:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    write_model(tmp_path / "base")
    output = tmp_path / "shards"
    return beingvl("build-shards", jsonl_path=path, output_path=output, **options)


def test_rows_with_and_without_target_spans_and_merged_image(tmp_path) -> None:
    rows = [ROW, {**ROW, "id": 8, "token_image_new": [279], "target_spans": [[7, 8]]}]
    options = {"model_path": tmp_path / "base", "template": "default"}
    assert build_shards(tmp_path, rows, **options) == 0
    reader = ShardReader(tmp_path / "shards")
    assert reader[0].input_ids.tolist() == [256, 262, 263, 264, 260, 5, 259, 6, 257]
    assert reader[0].target_spans.tolist() == [[4, 9]]  # a published row: its targets are token_1
    assert reader[1].input_ids.tolist() == [256, 262, 279, 260, 5, 259, 6, 257]
    assert reader[1].target_spans.tolist() == [[7, 8]]
    assert reader[0].id == "7"
    assert build_shards(tmp_path, rows, **options) == 0  # reused
    assert build_shards(tmp_path, rows[:1], **options) == 2  # another input, no --overwrite
    assert build_shards(tmp_path, rows[:1], **options, overwrite=True) == 0
    assert len(ShardReader(tmp_path / "shards")) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{not json", "line 2: not a token row"),
        ("[1]", "line 2: not a token row (the line is not an object)"),
        (
            '{"id":' + "1" * 30 + ',"token_0":[1],"token_1":[]}',
            "line 2: not a token row (BIGINT_ERROR",
        ),
        ({"id": 1, "token_0": []}, "missing field 'token_1'"),
        ({**ROW, "token_1": [2**40]}, "has id 1099511627776, the vocabulary ends"),
        ({**ROW, "token_1": [100000]}, "vocabulary"),
    ],
)
def test_bad_rows_are_named(tmp_path, capsys, row, message) -> None:
    assert build_shards(tmp_path, [ROW, row], model_path=tmp_path / "base") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "shards" / "manifest.json").exists()


def test_merged_images_far_behind_in_a_shard_are_seen(tmp_path, capsys) -> None:
    rows = [{**ROW, "token_1": [5] * 70_000}, {**ROW, "id": 8, "token_image_new": [279]}]
    assert build_shards(tmp_path, rows, model_path=tmp_path / "base") == 0
    assert read_manifest(tmp_path / "shards").details["merged_images"] == "not decoded"
    assert "the merged images in these shards were never decoded" in capsys.readouterr().out


def test_parts_of_another_version_are_not_gone_on_with(tmp_path, capsys, monkeypatch) -> None:
    options = {"model_path": tmp_path / "base", "part_bytes": 100}
    rows = [{**ROW, "id": number} for number in range(4)]
    with monkeypatch.context() as patch:
        patch.setattr("beingvl.data.build_shards.PARTS_VERSION", 1)
        assert build_shards(tmp_path, rows, **options, rank=0, num_ranks=2) == 0
    assert build_shards(tmp_path, rows, **options) == 2
    assert (
        "unfinished work with different parts_version (found 1, asked for 4)"
        in capsys.readouterr().err
    )
    assert build_shards(tmp_path, rows, **options, overwrite=True) == 0


def test_shards_that_a_kill_in_the_join_left_get_into_no_manifest(tmp_path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "shard-00001.arrow").write_bytes(b"of a run with more parts")
    assert build_shards(tmp_path, [ROW], model_path=tmp_path / "base") == 0
    assert len(ShardReader(tmp_path / "shards")) == 1


def test_an_overwrite_removes_shards_only(tmp_path, capsys) -> None:
    model = {"model_path": tmp_path / "base"}
    assert build_shards(tmp_path, [ROW], **model) == 0
    (tmp_path / "shards" / "picture.png").write_bytes(b"somebody's")
    assert build_shards(tmp_path, [ROW], **model, overwrite=True) == 0
    assert build_shards(tmp_path, [ROW, {**ROW, "id": 8}], **model, overwrite=True) == 0
    assert (tmp_path / "shards" / "picture.png").read_bytes() == b"somebody's"
    assert "picture.png" not in read_manifest(tmp_path / "shards").files
    rows = tmp_path / "rows" / "data.jsonl"
    rows.parent.mkdir()
    rows.write_text(json.dumps(ROW) + "\n")
    write_manifest_beside(rows, {})
    paths = {"jsonl_path": rows, "output_path": rows.parent}
    assert beingvl("build-shards", **paths, overwrite=True) == 2
    assert (
        "holds 'jsonl', which a step that writes 'shards' does not replace"
        in capsys.readouterr().err
        and rows.is_file()
    )


def test_unknown_vocabulary_and_missing_file(tmp_path, capsys) -> None:
    assert build_shards(tmp_path, [ROW]) == 2
    assert "--model" in capsys.readouterr().err
    paths = {"jsonl_path": tmp_path / "none.jsonl", "output_path": tmp_path / "x"}
    assert beingvl("build-shards", **paths, model_path=tmp_path / "base") == 2
    assert "does not exist" in capsys.readouterr().err


# ---- batches ----


def test_targets_are_shifted_and_never_cross_a_sample() -> None:
    one, two = sample([10, 11, 12], [(1, 3)]), sample([20, 21], [(1, 2)])
    batch = collate([one, two], [0, 1], LAYOUT)
    assert batch.input_ids.tolist() == [10, 11, 12, 20, 21]
    assert batch.target_ids.tolist() == [11, 12, IGNORED, 21, IGNORED]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 3, 5]
    assert batch.source_of_token.tolist() == [0, 0, 0, 1, 1]
    assert [
        array.dtype.name for array in (batch.input_ids, batch.target_ids, batch.position_ids)
    ] == ["int64"] * 3
    assert (batch.cu_seqlens.dtype.name, batch.token_kinds.dtype.name) == ("int32", "uint8")
    assert batch.num_target_tokens == 3


def test_every_token_has_its_kind() -> None:
    ids = [5, LAYOUT.boi_id, LAYOUT.first_image_id, LAYOUT.first_vbpe_id, LAYOUT.eos_id]
    assert [TOKEN_KINDS[kind] for kind in collate([sample(ids, [])], [0], LAYOUT).token_kinds] == [
        *("text", "special", "vq", "vbpe", "text")
    ]


def test_loss_on() -> None:
    one = sample([LAYOUT.bos_id, 270, 5, 6], [(3, 4)])
    assert shifted_targets(one, LAYOUT, "response").tolist() == [IGNORED, IGNORED, 6, IGNORED]
    assert shifted_targets(one, LAYOUT, "text").tolist() == [IGNORED, 5, 6, IGNORED]
    assert shifted_targets(one, LAYOUT, "all").tolist() == [270, 5, 6, IGNORED]


def test_no_sample_is_one_padding_token_without_a_target() -> None:
    batch = collate([], [], LAYOUT)
    assert batch.input_ids.tolist() == [LAYOUT.pad_id] and batch.num_target_tokens == 0


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_a_step_sees_the_same_samples_on_any_number_of_ranks(tmp_path, num_ranks) -> None:
    shards = ShardReader(write_shards(tmp_path))
    mixture = Mixture(shards.members, shards.sources, {"foundation": 0.7, "reasoning": 0.3}, 0)
    data = TrainingData(shards, mixture, 60, 64, sequences_per_step=6)
    assert data.num_steps >= 4
    for step in range(data.num_steps):
        alone = data.micro_batch(step, 0, 0, 1, 6)
        together = [
            name
            for micro_step in range(6 // num_ranks)
            for rank in range(num_ranks)
            for name in data.micro_batch(step, micro_step, rank, num_ranks, 1).sample_ids
        ]
        assert together == list(alone.sample_ids)


def test_a_run_sees_exactly_its_samples(tmp_path) -> None:
    shards = ShardReader(write_shards(tmp_path))
    mixture = Mixture(shards.members, shards.sources, {"foundation": 1}, 0)
    data = TrainingData(shards, mixture, mixture.num_samples, 64, sequences_per_step=4)
    seen = [
        name
        for step in range(data.num_steps)
        for name in data.micro_batch(step, 0, 0, 1, 4).sample_ids
    ]
    assert sorted(seen) == sorted(
        shards[index].id for index in range(60) if shards[index].category == "foundation"
    )


# ---- bad input ----


def test_duplicate_ids_are_refused_or_kept(tmp_path, capsys) -> None:
    model = {"model_path": tmp_path / "base"}
    assert build_shards(tmp_path, [ROW, {**ROW, "id": 8}, ROW], **model) == 2
    assert "1 rows repeat the id of another row, the first is '7'" in capsys.readouterr().err
    assert build_shards(tmp_path, [ROW, {**ROW, "id": 8}, ROW], **model, duplicate_ids="keep") == 0
    assert len(ShardReader(tmp_path / "shards")) == 3


def write_manifest_beside(path, lineage) -> None:
    details = {"layout": LAYOUT.to_dict(), "datasets": {}}
    write_manifest(path.parent, "jsonl", {}, lineage, details)


def test_rows_of_another_vocabulary(tmp_path, capsys) -> None:
    (tmp_path / "jsonl").mkdir()
    path = tmp_path / "jsonl" / "data.jsonl"
    path.write_text(json.dumps(ROW) + "\n")
    write_manifest_beside(path, {"vocab": LAYOUT.fingerprint()})
    write_model(
        tmp_path / "base",
        VocabLayout(num_text=258, num_vq=16, num_merges=9, bos_id=256, eos_id=257),
    )
    command = [
        "build-shards",
        f"--jsonl_path={path}",
        f"--output_path={tmp_path}/shards",
        f"--model_path={tmp_path}/base",
    ]
    assert cli.main(command) == 2
    assert "do not match: they were made with different vocab" in capsys.readouterr().err
    assert not (tmp_path / "shards").exists()


def test_a_file_that_the_manifest_beside_it_does_not_list_is_not_of_its_vocabulary(
    tmp_path, capsys
) -> None:
    listed, stranger = tmp_path / "jsonl" / "data.jsonl", tmp_path / "jsonl" / "mine.jsonl"
    listed.parent.mkdir()
    listed.write_text(json.dumps(ROW) + "\n")
    write_manifest_beside(listed, {"vocab": LAYOUT.fingerprint(), "vbpe": "blake3:1"})
    stranger.write_text(json.dumps({**ROW, "id": 8}) + "\n")
    command = ["build-shards", f"--jsonl_path={stranger}", f"--output_path={tmp_path}/shards"]
    assert cli.main(command) == 2
    assert (
        "mine.jsonl is not listed in a manifest beside it: say with --model"
        in capsys.readouterr().err
    )
    assert cli.main([*command, f"--model_path={write_model(tmp_path / 'base')}"]) == 0
    assert read_manifest(tmp_path / "shards").lineage == {"vocab": LAYOUT.fingerprint()}


def test_parts_of_any_size_give_the_same_rows(tmp_path) -> None:
    rows = [{**ROW, "id": n, "image": [f"{n}.png"], "conversations": "é" * n} for n in range(30)]
    found = []
    options = {"model_path": tmp_path / "base", "num_workers": 0, "overwrite": True}
    for part_bytes in (37, 500, 100000):
        assert build_shards(tmp_path, rows, **options, part_bytes=part_bytes) == 0
        reader = ShardReader(tmp_path / "shards")
        found.append(
            [
                (reader[n].id, reader[n].image, reader[n].input_ids.tolist())
                for n in range(len(reader))
            ]
        )
    assert found[0] == found[1] == found[2] and [entry[0] for entry in found[0]] == [
        str(n) for n in range(30)
    ]


def test_the_line_of_a_bad_row_is_counted_over_parts(tmp_path, capsys) -> None:
    rows = [*({**ROW, "id": n} for n in range(20)), {"id": 1}]
    options = {"model_path": tmp_path / "base", "num_workers": 0, "part_bytes": 200}
    assert build_shards(tmp_path, rows, **options) == 2
    assert "line 21: not a token row" in capsys.readouterr().err


def test_a_line_without_an_end_is_not_read_as_a_whole(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("beingvl.data.token_rows.MAX_LINE_BYTES", 1000)
    rows = [ROW, {**ROW, "id": 8, "token_1": [5] * 2000}]
    options = {"model_path": tmp_path / "base", "num_workers": 0}
    assert build_shards(tmp_path, rows, **options, part_bytes=500) == 2
    capsys.readouterr()
    assert build_shards(tmp_path, rows, **options, part_bytes=50000, overwrite=True) == 2
    assert (
        "rows.jsonl has a line of more than 1,000 bytes; expected JSONL" in capsys.readouterr().err
    )


def test_flipped_bits_are_found_by_verify(tmp_path, capsys) -> None:
    write_shards(tmp_path)
    path = tmp_path / "shard-00000.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert cli.main(["verify", str(tmp_path)]) == 2
    assert "does not have the hash" in capsys.readouterr().err


def test_a_flipped_bit_that_makes_a_sample_impossible_stops_the_reader(tmp_path, capsys) -> None:
    """Training does not re-hash gigabytes at its start; an id that the model has no row for is
    still an error with a name.
    """
    path = write_shards(tmp_path) / "shard-00000.arrow"
    data = path.read_bytes()
    reader = ShardReader(tmp_path)
    ids, spans = (
        reader[3].input_ids.tobytes(),
        b"".join(reader[n].target_spans.tobytes() for n in (3, 4)),
    )
    text = b"sample-3sample-4"
    for found, at, message in (
        (ids, 2, "ids, spans"),
        (ids, 3, "ids, spans"),
        (spans, 7, "ids, spans"),
        (text, 7, "text"),
    ):
        flipped = bytearray(data)
        assert data.count(found) == 1
        flipped[data.index(found) + at] ^= 0x80
        path.write_bytes(flipped)
        with pytest.raises(
            InputError,
            match=f"shard-00000.arrow is damaged: its row 3 has .*{message}.*beingvl verify",
        ):
            ShardReader(tmp_path)[3]
        if found is ids:
            assert (
                cli.main(
                    ["report", "data", str(tmp_path), "--output_path", str(tmp_path / "page.html")]
                )
                == 2
            )
            assert "it holds an id outside the vocabulary" in capsys.readouterr().err


def test_an_index_that_does_not_fit(tmp_path) -> None:
    write_shards(tmp_path)
    lengths = np.load(tmp_path / "lengths.npy")
    np.save(tmp_path / "lengths.npy", lengths[:3])
    list_anew(tmp_path)
    with pytest.raises(InputError, match="holds 3 samples, the manifest 60"):
        ShardReader(tmp_path)
    (tmp_path / "lengths.npy").write_bytes(b"x")
    list_anew(tmp_path)
    with pytest.raises(InputError, match="damaged"):
        ShardReader(tmp_path)


def test_a_run_that_draws_no_sample(tmp_path) -> None:
    shards = ShardReader(write_shards(tmp_path))
    with pytest.raises(
        InputError, match=r"draws none of the 40 samples of its mixture; raise beingvl\.epochs"
    ):
        TrainingData(
            shards, Mixture(shards.members, shards.sources, {"foundation": 1}, 0), 0, 64, 4
        )


def test_a_source_without_samples() -> None:
    with pytest.raises(InputError, match="'b', which has no sample"):
        Mixture([np.arange(3), np.arange(0)], ["a", "b"], {"a": 1, "b": 1}, 0)


def test_more_sources_than_a_byte_can_name(tmp_path) -> None:
    writer = ShardWriter(tmp_path, LAYOUT)
    for number in range(257):
        writer.add(sample([1, 2], [(1, 2)], category=str(number)))
    with pytest.raises(InputError, match="257 sources"):
        writer.finish({}, {})


def test_the_kept_plan_is_the_plan(tmp_path) -> None:
    shards = ShardReader(write_shards(tmp_path))
    mixture = Mixture(shards.members, shards.sources, {"foundation": 0.7, "reasoning": 0.3}, 0)
    made = TrainingData(shards, mixture, 150, 64, 4)
    assert made.num_steps and len(list(tmp_path.glob("plan-*"))) == 1
    kept = TrainingData(shards, mixture, 150, 64, 4)
    assert kept.num_steps == made.num_steps and len(list(tmp_path.glob("plan-*"))) == 1
    assert (
        kept.plan.efficiency == made.plan.efficiency
        and kept.plan.starts.tolist() == made.plan.starts.tolist()
    )
    assert (
        TrainingData(shards, mixture, 150, 80, 4).num_steps
        and len(list(tmp_path.glob("plan-*"))) == 2
    )
    with pytest.raises(
        InputError, match=r"samples are longer than sequence_length 20 .*tokenize with --max_length"
    ):
        TrainingData(shards, mixture, 150, 20, 4)
    for path in tmp_path.glob("plan-*"):
        path.write_text(path.read_text()[:-3])
    with pytest.raises(
        InputError, match=r"plan-\w+\.tmp is damaged .*; remove it, it is made again"
    ):
        TrainingData(shards, mixture, 150, 64, 4)


def test_shares_by_something_else_are_refused(tmp_path) -> None:
    with pytest.raises(InputError, match="mixture_by is 'rows', expected samples or tokens"):
        open_mixture(ShardReader(write_shards(tmp_path)), {"foundation": 1}, "rows", 0)


def test_a_plan_that_cannot_be_kept_stops_nothing(tmp_path, monkeypatch) -> None:
    def full(path: object, data: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("beingvl.data.loader.write_atomically", full)
    shards = ShardReader(write_shards(tmp_path))
    assert TrainingData(
        shards, Mixture(shards.members, shards.sources, {"foundation": 1}, 0), 40, 64, 4
    ).num_steps
    assert not list(tmp_path.glob("plan-*"))


def test_a_disk_that_is_full_behind_the_shard_is_named(tmp_path, monkeypatch, capsys) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    save = ShardFacts.save

    def save_on_a_full_disk(facts: ShardFacts, path: Path) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))
        save(facts, path)

    monkeypatch.setattr(ShardFacts, "save", save_on_a_full_disk)
    rows = [{**ROW, "id": n} for n in range(1000)]
    try:
        assert build_shards(tmp_path, rows, model_path=tmp_path / "base") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "make room and start the same command again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("members.npy", 60, "it names the sample 60"),
        ("lengths.npy", 0, "it holds a length of 0 tokens"),
    ],
)
def test_an_index_that_was_damaged_stops_the_loader(tmp_path, name, value, message) -> None:
    write_shards(tmp_path)
    array = np.load(tmp_path / name)
    array[7] = value
    np.save(tmp_path / name, array)
    list_anew(tmp_path)
    shards = ShardReader(tmp_path)
    data = TrainingData(
        shards,
        Mixture(shards.members, shards.sources, {"foundation": 1, "reasoning": 1}, 0),
        60,
        64,
        4,
    )
    with pytest.raises(InputError, match=f"{name} is damaged: {message}.*beingvl verify"):
        data.micro_batch(0, 0, 0, 1, 4)


def test_lengths_that_changed_since_they_were_planned_stop_the_loader(tmp_path) -> None:
    shards = ShardReader(write_shards(tmp_path))
    mixture = Mixture(shards.members, shards.sources, {"foundation": 1}, 0)
    assert TrainingData(shards, mixture, 40, 64, 4).num_steps
    shards = ShardReader(tmp_path)
    np.save(tmp_path / "lengths.npy", np.full(60, 60, np.int32))  # into the map
    with pytest.raises(InputError, match=r"lengths.npy is damaged: it does not match plan-\w+.tmp"):
        TrainingData(shards, mixture, 40, 64, 4).micro_batch(0, 0, 0, 1, 4)


def test_a_bit_flipped_in_the_head_of_a_shard_or_an_index_is_harmless_or_named(tmp_path) -> None:
    write_shards(tmp_path)
    for name, places in (
        ("shard-00000.arrow", range(-300, 0)),
        ("shard-00000.arrow", range(400, 1000)),
        ("members.npy", range(128)),
    ):
        data = (tmp_path / name).read_bytes()
        num_refused = 0
        for place in places:
            flipped = bytearray(data)
            flipped[place] ^= 0x40
            (tmp_path / name).write_bytes(flipped)
            try:
                ShardReader(tmp_path)[0]
            except InputError as error:  # no other kind
                assert name in str(error)
                num_refused += 1
        assert num_refused > 20
        (tmp_path / name).write_bytes(data)


@pytest.mark.parametrize("by", ["samples", "tokens"])
def test_realised_shares_are_those_of_the_draws(tmp_path, by) -> None:
    shards = ShardReader(write_shards(tmp_path))
    mixture = open_mixture(shards, {"foundation": 0.7, "reasoning": 0.3}, by, 0)
    for _ in range(2):  # the second finds a kept plan
        data = TrainingData(shards, mixture, 137, 64, 4)
        drawn = mixture.draw(0, 137)
        samples = np.bincount(shards.source_of[drawn])
        tokens = np.bincount(shards.source_of[drawn], weights=shards.lengths[drawn]).astype(int)
        assert data.num_steps and tokens[0] / tokens.sum() != samples[0] / 137
        expected = [
            Share(int(samples[n]), samples[n] / 137, int(tokens[n]), tokens[n] / tokens.sum())
            for n in range(len(samples))
        ]
        assert [data.realised_shares(data.num_steps)[name] for name in shards.sources] == expected


def test_realised_shares_of_a_run_that_stops_earlier_are_those_of_its_batches(tmp_path) -> None:
    shards = ShardReader(write_shards(tmp_path))
    data = TrainingData(
        shards,
        open_mixture(shards, {"foundation": 0.7, "reasoning": 0.3}, "samples", 0),
        9000,
        64,
        4,
    )
    for num_steps in (1, data.num_steps // 2 + 3):  # in the first window, and in a later one
        found = data.realised_shares(num_steps)
        seen = np.concatenate([data.samples_of(sequence) for sequence in range(4 * num_steps)])
        assert (len(seen) < 4096) == (num_steps == 1)
        for number, name in enumerate(shards.sources):
            of_source = seen[shards.source_of[seen] == number]
            assert (found[name].samples, found[name].tokens) == (
                len(of_source),
                shards.lengths[of_source].sum(),
            )
            assert found[name].share_of_samples == len(of_source) / len(seen)


def test_a_mixture_by_tokens_has_the_shares_of_tokens_that_were_asked_for(tmp_path) -> None:
    writer = ShardWriter(tmp_path, LAYOUT)
    for number in range(4000):
        ids = np.ones(5 if number % 2 else 40, np.int32)
        writer.add(
            Sample(
                str(number), "", ("long", "short")[number % 2], ids, np.array([[1, 2]], np.int32)
            )
        )
    writer.finish({"vocab": LAYOUT.fingerprint()}, {})
    shards = ShardReader(tmp_path)
    data = TrainingData(
        shards, open_mixture(shards, {"long": 0.4, "short": 0.6}, "tokens", 0), 4000, 64, 4
    )
    shares = data.realised_shares(data.num_steps)
    assert shares["short"].share_of_tokens == pytest.approx(0.6, abs=0.001)
    assert shares["short"].share_of_samples == pytest.approx(0.6 * 8 / (0.6 * 8 + 0.4), abs=0.001)


def test_pages_that_are_given_back_are_read_again(tmp_path) -> None:
    reader, calm = (
        ShardReader(write_shards(tmp_path), bytes_mapped_at_most=-(1 << 40)),
        ShardReader(tmp_path),
    )
    ids = [reader[n].input_ids for n in range(60)]
    assert all((ids[n] == calm[n].input_ids).all() for n in range(60))
