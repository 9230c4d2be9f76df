"""Weight folders: every layout reads the same, rewriting changes what it should and nothing
else, damage is named.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from beingvl.artefact.hashes import hash_file
from beingvl.artefact.manifest import write_manifest
from beingvl.errors import InputError
from beingvl.model.rewrite_weights import (
    NewTensor,
    bytes_to_write,
    check_disk_space,
    rewrite_weights,
)
from beingvl.model.weight_files import INDEX_FILE, WeightFolder, read_header
from tests.programs import run_program

SHARDS = {
    "model-00001-of-00003.safetensors": ["embed", "layer0"],
    "model-00002-of-00003.safetensors": ["layer1", "scale"],
    "model-00003-of-00003.safetensors": ["head"],
}


def tensors() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return {
        "embed": torch.randn(10, 4, generator=random).bfloat16(),
        "layer0": torch.randn(3, 5, generator=random).bfloat16(),
        "layer1": torch.randn(7, generator=random),
        "scale": torch.tensor(1.5),
        "head": torch.randn(10, 4, generator=random).bfloat16(),
    }


def write_folder(folder: Path, layout: str) -> Path:
    folder.mkdir()
    state = tensors()
    if layout == "single":
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    elif layout == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    elif layout == "legacy_bin":
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    else:
        bins = layout == "sharded_bin"
        weight_map = {}
        for name, members in SHARDS.items():
            name = "pytorch_" + name.replace(".safetensors", ".bin") if bins else name
            part = {member: state[member] for member in members}
            torch.save(part, folder / name) if bins else save_file(
                part, folder / name, metadata={"format": "pt"}
            )
            weight_map |= dict.fromkeys(members, name)
        index = "pytorch_model.bin.index.json" if bins else INDEX_FILE
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


LAYOUTS = ["single", "sharded", "bin", "legacy_bin", "sharded_bin"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_reads_the_same(tmp_path, layout):
    weights = WeightFolder(write_folder(tmp_path / "source", layout))
    assert set(weights) == set(tensors())
    for name, expected in tensors().items():
        assert weights[name].dtype == expected.dtype and torch.equal(weights[name], expected)
        assert (
            weights.shape(name) == tuple(expected.shape) and weights.dtype(name) == expected.dtype
        )
    assert torch.equal(weights["embed"][2:5], tensors()["embed"][2:5])
    assert weights.num_bytes == sum(tensor.nbytes for tensor in tensors().values())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("link", [True, False])
def test_rewrite_replaces_adds_drops_and_keeps_the_rest(tmp_path, layout, link):
    source = write_folder(tmp_path / "source", layout)
    before = {path.name: hash_file(path) for path in source.iterdir()}
    blocks = [torch.zeros(6, 4).bfloat16(), torch.ones(6, 4).bfloat16()]
    replace = {
        "embed": NewTensor((12, 4), torch.bfloat16, lambda: iter(blocks)),
        "layer0": lambda: torch.full((3, 5), 2.0).bfloat16(),
        "added": NewTensor((2,), torch.float32, lambda: torch.tensor([1.0, 2.0])),
    }
    hashes = rewrite_weights(source, tmp_path / "target", replace, link=link, drop=["head"])

    expected = tensors() | {
        "embed": torch.cat(blocks),
        "layer0": torch.full((3, 5), 2.0).bfloat16(),
    }
    expected["added"] = torch.tensor([1.0, 2.0])
    del expected["head"]
    weights = WeightFolder(tmp_path / "target")
    assert set(weights) == set(expected)
    for name, tensor in expected.items():
        assert weights[name].dtype == tensor.dtype and torch.equal(weights[name], tensor), name
    assert set(hashes) == {path.name for path in (tmp_path / "target").iterdir()}
    assert hashes == {name: hash_file(tmp_path / "target" / name) for name in hashes}
    assert before == {path.name: hash_file(path) for path in source.iterdir()}
    for path in (tmp_path / "target").glob(
        "*.safetensors"
    ):  # the official library accepts the hand-written headers
        assert set(load_file(path)) == set(read_header(path))


def test_unchanged_shards_are_links_or_copies(tmp_path):
    source = write_folder(tmp_path / "source", "sharded")
    replace = {"embed": lambda: torch.zeros(10, 4).bfloat16()}
    rewrite_weights(source, tmp_path / "linked", replace)
    rewrite_weights(source, tmp_path / "copied", replace, link=False)
    first, second, third = SHARDS
    for name in (second, third):
        assert (tmp_path / "linked" / name).samefile(source / name)
        assert not (tmp_path / "copied" / name).samefile(source / name)
        assert (tmp_path / "copied" / name).read_bytes() == (source / name).read_bytes()
    assert not (tmp_path / "linked" / first).samefile(source / first)
    index = json.loads((tmp_path / "linked" / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == WeightFolder(source).num_bytes


def test_a_link_into_a_download_cache_is_followed(tmp_path):
    source = write_folder(tmp_path / "source", "single")
    (source / "model.safetensors").rename(tmp_path / "blob")
    (source / "model.safetensors").symlink_to("../blob")
    rewrite_weights(source, tmp_path / "target", {})
    copied = tmp_path / "target" / "model.safetensors"
    assert not copied.is_symlink() and copied.samefile(tmp_path / "blob")


def test_writing_to_a_read_tensor_does_not_reach_the_file(tmp_path):
    source = write_folder(tmp_path / "source", "single")
    WeightFolder(source)["embed"].zero_()
    assert torch.equal(WeightFolder(source)["embed"], tensors()["embed"])


def test_released_rows_are_read_again(tmp_path):
    weights = WeightFolder(write_folder(tmp_path / "source", "sharded"))
    embed = weights["embed"]
    weights.release()
    assert torch.equal(embed, tensors()["embed"])


def test_memory_holds_one_tensor_at_a_time(tmp_path):
    """40 tensors of 8 MB pass through a process whose private memory grows by less than 100 MB,
    torch's own buffers included.
    """
    source = tmp_path / "source"
    source.mkdir()
    save_file(
        {
            f"layer{number}": torch.full((2 << 20,), number, dtype=torch.float32)
            for number in range(40)
        },
        source / "model.safetensors",
    )
    done = run_program("peak_of_rewrite", source, tmp_path / "target", is_measured=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100
    assert torch.equal(WeightFolder(tmp_path / "target")["layer2"], torch.full((2 << 20,), 4.0))


def test_a_killed_run_leaves_only_whole_files(tmp_path):
    source = write_folder(tmp_path / "source", "sharded")
    assert run_program("die_in_rewrite", source, tmp_path / "target").returncode == 9
    first, second, _ = SHARDS
    finished = {
        path.name for path in (tmp_path / "target").iterdir() if not path.name.endswith(".tmp")
    }
    # The second is linked beside the others.
    assert first in finished and finished <= {first, second}
    for name in finished:
        assert set(load_file(tmp_path / "target" / name)) == set(SHARDS[name])


def damage(folder: Path, how: str) -> None:
    first = folder / "model-00001-of-00003.safetensors"
    if how == "missing shard":
        first.unlink()
    elif how == "truncated shard":
        os.truncate(first, first.stat().st_size - 1)
    elif how == "empty shard":
        first.write_bytes(b"")
    elif how == "broken header":
        first.write_bytes((20).to_bytes(8, "little") + b"{" * 20)
    elif how == "wrong offsets":
        header = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}
        text = json.dumps(header).encode()
        first.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 4)
    elif how == "index names a ghost":
        index = json.loads((folder / INDEX_FILE).read_text())
        index["weight_map"]["ghost"] = first.name
        (folder / INDEX_FILE).write_text(json.dumps(index))
    elif how == "index is no JSON":
        (folder / INDEX_FILE).write_text("[1, 2]")
    elif how == "no index":
        (folder / INDEX_FILE).unlink()
    elif how == "no weights":
        shutil.rmtree(folder)
        folder.mkdir()
    elif how == "no folder":
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing shard", "00001-of-00003.safetensors is missing"),
        ("truncated shard", "it was truncated"),
        ("empty shard", "not a safetensors file"),
        ("broken header", "its header is not valid JSON"),
        ("wrong offsets", "do not fit F32"),
        ("index names a ghost", "holds 'ghost', but it does not"),
        ("index is no JSON", "holds list, expected a JSON object"),
        ("no index", "but no model.safetensors.index.json"),
        ("no weights", "has no weights"),
        ("no folder", "is not a folder"),
    ],
)
def test_damage_is_named(tmp_path, how, message):
    source = write_folder(tmp_path / "source", "sharded")
    damage(source, how)
    with pytest.raises(InputError, match=message):
        rewrite_weights(source, tmp_path / "target", {})
    assert not (tmp_path / "target").exists()


class Payload:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


def test_pickles_with_code_are_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "source"
    folder.mkdir()
    for legacy in (False, True):
        torch.save(
            {"embed": Payload()},
            folder / "pytorch_model.bin",
            _use_new_zipfile_serialization=not legacy,
        )
        with pytest.raises(InputError, match="holds more than tensors"):
            WeightFolder(folder)
        assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "plain state dict"),
        ({"a": 3}, "plain state dict"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "complex64"),
    ],
)
def test_pickles_of_other_things_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=message):
        WeightFolder(tmp_path)


def test_a_truncated_pickle_is_named(tmp_path):
    source = write_folder(tmp_path / "source", "bin")
    os.truncate(source / "pytorch_model.bin", 300)
    with pytest.raises(InputError, match="may be truncated"):
        WeightFolder(source)


def test_an_unknown_dtype_is_copied_but_not_read(tmp_path):
    text = json.dumps({"a": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "model.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + b"abc"
    )
    with pytest.raises(InputError, match="F6_E2M3"):
        WeightFolder(tmp_path / "source")["a"]
    added = NewTensor((1,), torch.float32, lambda: torch.ones(1))
    rewrite_weights(tmp_path / "source", tmp_path / "target", {"b": added})
    assert (tmp_path / "target" / "model.safetensors").read_bytes().endswith(b"abc")


def test_wrong_requests_are_refused_before_writing(tmp_path, monkeypatch):
    source = write_folder(tmp_path / "source", "sharded")
    with pytest.raises(InputError, match="both source and target"):
        rewrite_weights(source, tmp_path / "x" / ".." / "source", {})
    with pytest.raises(InputError, match="no tensor 'ghost' to replace"):
        rewrite_weights(source, tmp_path / "target", {"ghost": lambda: torch.zeros(1)})
    with pytest.raises(InputError, match="no tensor 'ghost' to drop"):
        rewrite_weights(source, tmp_path / "target", {}, drop=["ghost"])
    huge = NewTensor((1 << 50,), torch.float32, lambda: torch.zeros(1))
    num_bytes = bytes_to_write(WeightFolder(source), tmp_path / "target", {"embed": huge})
    with pytest.raises(InputError, match="GB are to be written, but the disk has"):
        check_disk_space(tmp_path / "target", num_bytes)
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    "made", [torch.zeros(10, 4), torch.zeros(4, 10).bfloat16(), torch.zeros(9, 4).bfloat16()]
)
def test_a_tensor_that_is_not_as_announced_is_a_defect_and_leaves_no_file(tmp_path, made):
    source = write_folder(tmp_path / "source", "single")
    with pytest.raises(AssertionError):
        rewrite_weights(source, tmp_path / "target", {"embed": lambda: made})
    assert not any((tmp_path / "target").iterdir())


def test_weights_left_by_another_model_do_not_survive(tmp_path):
    source = write_folder(tmp_path / "source", "sharded")
    target = tmp_path / "target"
    target.mkdir()
    for name in (
        "model.safetensors",
        "pytorch_model.bin",
        "model-00001-of-00002.safetensors",
        "pytorch_model.bin.index.json",
    ):
        (target / name).write_text("stale")
    rewrite_weights(source, target, {})
    assert {path.name for path in target.iterdir()} == {*SHARDS, INDEX_FILE}
    rewrite_weights(write_folder(tmp_path / "single", "single"), target, {})
    assert {path.name for path in target.iterdir()} == {"model.safetensors"}


def test_shards_of_any_bin_name_become_safetensors(tmp_path):
    source = write_folder(tmp_path / "source", "sharded_bin")
    index = source / "pytorch_model.bin.index.json"
    index.write_text(index.read_text().replace("pytorch_model-", "weights-"))
    for path in source.glob("pytorch_model-*.bin"):
        path.rename(source / path.name.replace("pytorch_model-", "weights-"))
    rewrite_weights(source, tmp_path / "target", {})
    names = {path.name for path in (tmp_path / "target").iterdir()}
    assert names == {
        INDEX_FILE,
        *(f"weights-0000{number}-of-00003.safetensors" for number in (1, 2, 3)),
    }
    assert torch.equal(WeightFolder(tmp_path / "target")["embed"], tensors()["embed"])


def test_a_single_file_stands_before_an_index_as_in_transformers(tmp_path):
    source = write_folder(tmp_path / "source", "sharded")
    save_file({"embed": torch.zeros(1)}, source / "model.safetensors")
    assert set(WeightFolder(source)) == {"embed"}


def test_linked_files_have_the_hash_of_all_their_bytes(tmp_path):
    source = write_folder(tmp_path / "source", "single")
    hashes = rewrite_weights(source, tmp_path / "target", {})
    assert (tmp_path / "target" / "model.safetensors").samefile(source / "model.safetensors")
    assert hashes == {"model.safetensors": hash_file(source / "model.safetensors")}
    # What the source's manifest says is taken as it is.
    manifest = write_manifest(source, "model", {}, {}, known_hashes={"model.safetensors": "said"})
    assert manifest.files["model.safetensors"]["hash"] == "said"
    assert rewrite_weights(source, tmp_path / "second", {}) == {"model.safetensors": "said"}


def test_a_pickle_of_a_few_bytes_was_truncated(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03")
    with pytest.raises(InputError, match="has 3 bytes: it was truncated"):
        WeightFolder(tmp_path)
