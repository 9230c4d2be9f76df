"""Offload to NVMe, of the optimizer and of the weights: the same results, really on the disk,
resumable anywhere.

Slow, because DeepSpeed compiles an op before the first of them, which takes minutes; skipped where
it cannot (no libaio-dev).
"""

import contextlib
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from beingvl.data.arrow_shards import ShardReader
from beingvl.data.stage_data import data_of
from beingvl.errors import InputError
from beingvl.model.weight_files import WeightFolder
from beingvl.stage.stage_config import load_stage_config, parse_stage_config
from beingvl.train import nvme
from beingvl.train.metrics import read_metrics
from beingvl.train.ranks import Ranks
from tests.launcher import log_of, rank_processes, run, start, wait_for_step
from tests.plain_torch import train_plain
from tests.tiny import LAYOUT, stage_fields, write_inputs, write_model
from tests.train.planted import poison
from tests.train.programs import run_program
from tests.train.run_stages import run_stages

NUM_STEPS = 4
SHARE_BYTES = 1 << 20  # DeepSpeed leaves smaller pieces in memory
SUB_GROUP = 2_000_000
FROZEN = [{"match": "visual_rows"}, {"match": "layers[:1]"}, {"match": ".*", "train": False}]
FROZEN_RULES = [f"beingvl.trainable={json.dumps(FROZEN)}"]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A model of 11 million weights, most of them in matrices of which a half is more than 1 MB
    in bf16 too.
    """
    folder = tmp_path_factory.mktemp("nvme")
    fields = stage_fields(max_steps=NUM_STEPS, epochs=6, checkpoint_every_steps=2)
    fields["optimizer"]["params"]["lr"] = 3e-4
    fields["train_batch_size"] = 6
    write_inputs(folder, all=fields)
    write_model(folder / "base", num_layers=2, hidden_size=768)
    (folder / "disk").mkdir()
    return folder


@pytest.fixture(scope="module")
def needs_op() -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip(
            "DeepSpeed's async_io op cannot be compiled here: apt-get install libaio-dev g++"
        )


def offload(work: Path, *keys: str, **pipeline: bool) -> list[str]:
    """Overrides that send `optimizer`, `param` or both to the folder `disk`."""
    here = {"device": "nvme", "nvme_path": str(work / "disk")}
    more = {"optimizer": pipeline, "param": {"max_in_cpu": 0}}
    words = [f"zero_optimization.offload_{key}={json.dumps({**here, **more[key]})}" for key in keys]
    return [*words, f"zero_optimization.sub_group_size={SUB_GROUP}"]


def job(work: Path, name: str, *words: str, **more: object) -> dict:
    places = {
        "config": work / "all.json",
        "model": work / "base",
        "data": work / "shards",
        "output": work / name,
    }
    return {**places, "set": list(words), **more}


@contextlib.contextmanager
def watched(folder: Path):
    """Path -> its largest size in bytes, of every file that is in `folder` for a moment."""
    seen, done = {}, threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            for parent, _, names in os.walk(folder):
                for path in (Path(parent, name) for name in names):
                    with contextlib.suppress(OSError):
                        seen[path] = max(seen.get(path, 0), path.stat().st_size)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def assert_close(found: Path, expected: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    for name, tensor in dict(WeightFolder(found)).items():
        assert (tensor - expected[name]).norm() <= tolerance * expected[name].norm(), (found, name)


@pytest.mark.slow
@pytest.mark.usefixtures("needs_op")
def test_both_offloads_equal_plain_torch_from_the_disk_that_two_runs_share(work) -> None:
    """One rank and two, side by side with one nvme_path; each leaves nothing there."""
    losses, weights = train_plain(
        work / "base", work / "shards", load_stage_config(work / "all.json")
    )
    variants = {
        "optimizer": offload(work, "optimizer"),
        "pipelined": offload(work, "optimizer", "param", pipeline_read=True, pipeline_write=True),
        "weights": offload(work, "param"),
        "mixed": [*offload(work, "param"), "zero_optimization.offload_optimizer.device=cpu"],
    }
    jobs = {
        n: [job(work, f"{name}-{n}", *words) for name, words in variants.items()] for n in (1, 2)
    }
    with watched(work / "disk") as seen, ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda num_ranks: run_stages(num_ranks, jobs[num_ranks], work), jobs))
    assert not list((work / "disk").iterdir())
    for output in [Path(one["output"]) for of_n in jobs.values() for one in of_n]:
        assert [row["loss"] for row in read_metrics(output)] == pytest.approx(losses, rel=1e-5)
        assert_close(output / "final", weights)
    runs = {path.relative_to(work / "disk").parts[0] for path in seen}
    assert len(runs) == 8
    num_elements = sum(weight.numel() for weight in weights.values())
    shares = [weight.numel() * 4 for weight in weights.values()]
    for name in runs:
        files = {
            path.relative_to(work / "disk" / name): size
            for path, size in seen.items()
            if name in path.parts
        }
        num_ranks = len({path.parts[0] for path in files})
        moments = [path for path in files if path.name.startswith("exp_avg-")]
        stored = sum(size for path, size in files.items() if path in moments)
        params = {
            path: size for path, size in files.items() if path.name.endswith("_param.tensor.swp")
        }
        assert moments or params
        if moments:
            assert 0.9 * 4 * num_elements < stored < 4.1 * num_elements
        if params:
            on_disk = [share // num_ranks for share in shares if share // num_ranks >= SHARE_BYTES]
            assert len(params) == num_ranks * len(on_disk)
            assert sum(params.values()) == pytest.approx(num_ranks * sum(on_disk), rel=0.01)


@pytest.mark.slow
@pytest.mark.usefixtures("needs_op")
def test_a_resumed_run_on_nvme_has_the_same_bytes_and_frozen_weights_their_own(work) -> None:
    """Losses, weights and moments, on two ranks, float32 and bf16, with frozen layers; also
    written in the background.
    """
    ways = {"optimizer": ["optimizer"], "both": ["optimizer", "param"]}
    words = {
        f"same-{name}-{bits}": [
            *offload(work, *keys),
            f"bf16.enabled={json.dumps(bits == 'bf16')}",
            *FROZEN_RULES,
        ]
        for name, keys in ways.items()
        for bits in ("fp32", "bf16")
    }
    words["same-background"] = [
        *offload(work, "optimizer", "param", pipeline_write=True),
        "beingvl.background_save=true",
    ]
    jobs = [job(work, name, *more) for name, more in words.items()]
    run_stages(2, jobs, work)
    expected = {name: bytes_after(work / name) for name in words}
    for name in words:
        forget_the_end(work / name)
    run_stages(2, jobs, work)
    start = dict(WeightFolder(work / "base"))
    for name in words:
        assert bytes_after(work / name) == expected[name], name
        if name == "same-background":
            continue
        for key, tensor in dict(WeightFolder(work / name / "final")).items():
            if "layers.1" in key or key == "model.norm.weight":
                assert torch.equal(tensor, start[key]), (name, key)
            elif "embed_tokens" in key or "lm_head" in key:
                assert torch.equal(tensor[: LAYOUT.num_text], start[key][: LAYOUT.num_text]), (
                    name,
                    key,
                )
                assert not torch.equal(tensor[LAYOUT.num_text :], start[key][LAYOUT.num_text :]), (
                    name,
                    key,
                )


def bytes_after(output: Path) -> list:
    newest = output / "checkpoints" / f"step-{NUM_STEPS:08d}"
    files = [*sorted((output / "final").glob("*.safetensors")), *sorted(newest.glob("rank-*"))]
    return [[row["loss"] for row in read_metrics(output)], *(path.read_bytes() for path in files)]


def forget_the_end(output: Path) -> None:
    """As if killed after step 2."""
    for folder in (output / "final", output / "checkpoints" / f"step-{NUM_STEPS:08d}"):
        (folder / "manifest.json").unlink()


@pytest.mark.slow
@pytest.mark.usefixtures("needs_op")
def test_checkpoints_go_to_nvme_and_back_at_another_world_size(work) -> None:
    """Written by two ranks, read by three and by one; moments carried into a new stage are the
    same with and without.
    """
    both = offload(work, "optimizer", "param")
    first = {
        "plain": [],
        "stage-1": ["zero_optimization.stage=1"],
        "to-3": both,
        "to-stage-2": both,
    }
    run_stages(2, [job(work, name, *words) for name, words in first.items()], work)
    expected = dict(WeightFolder(work / "plain" / "final"))
    for name in first:
        forget_the_end(work / name)
    run_stages(1, [job(work, "plain", *both)], work)
    changed = {"stage-1": both, "to-3": both, "to-stage-2": ["zero_optimization.stage=2"]}
    run_stages(3, [job(work, name, *words) for name, words in changed.items()], work)
    for name in first:
        assert_close(work / name / "final", expected)
    moments = {
        "moments": work / "plain" / "checkpoints" / f"step-{NUM_STEPS:08d}",
        "model": work / "plain" / "final",
    }
    run_stages(
        2,
        [
            job(work, f"carried-{name}", *words, **moments)
            for name, words in {"cpu": [], "nvme": both}.items()
        ],
        work,
    )
    assert_close(
        work / "carried-nvme" / "final", dict(WeightFolder(work / "carried-cpu" / "final"))
    )


@pytest.mark.slow
@pytest.mark.usefixtures("needs_op")
def test_a_killed_run_leaves_files_that_its_next_start_replaces_and_removes(work) -> None:
    words = [
        *offload(work, "optimizer", "param"),
        *FROZEN_RULES,
        "beingvl.checkpoint_every_steps=1",
    ]
    places, whole, killed = (
        (work / "all.json", work / "base", work / "shards"),
        work / "whole",
        work / "killed",
    )
    assert run(2, *places, whole, *words) == 0, log_of(whole)
    launcher = start(2, *places, killed, *words)
    wait_for_step(launcher, killed, 2)
    for process in rank_processes(launcher).values():
        process.kill()
    assert launcher.wait(timeout=60) != 0
    (left,) = (work / "disk").iterdir()
    assert any(path.stat().st_size for path in left.rglob("*.swp"))
    assert run(2, *places, killed, *words) == 0, log_of(killed)
    assert "resumed from" in log_of(killed) and not left.exists()
    assert bytes_after(killed) == bytes_after(whole)


@pytest.mark.slow
@pytest.mark.usefixtures("needs_op")
def test_a_step_that_is_not_finite_changes_nothing_on_the_disk(work) -> None:
    """The second of three; its gradients were written out before that was known."""
    data = data_of(load_stage_config(work / "all.json"), ShardReader(work / "shards"))
    first, second, third = (
        set(data.micro_batch(step, 0, 0, 1, 6).input_ids.tolist()) for step in range(3)
    )
    token = next(token for token in sorted(second - first - third) if token < LAYOUT.num_text)
    model = poison(work / "base", work / "poisoned", token)
    short = ["beingvl.max_steps=3", "beingvl.checkpoint_every_steps=0"]
    words = {"skipped": short, "skipped-nvme": [*short, *offload(work, "optimizer", "param")]}
    run_stages(
        2, [{**job(work, name, *more), "model": model} for name, more in words.items()], work
    )
    assert [[row["skipped"] for row in read_metrics(work / name)] for name in words] == [
        [0, 1, 0]
    ] * 2
    expected = dict(WeightFolder(work / "skipped" / "final"))
    for name, tensor in dict(WeightFolder(work / "skipped-nvme" / "final")).items():
        rows = tensor.isfinite() & expected[name].isfinite()
        assert rows.sum() >= tensor.numel() - 768, name
        assert ((tensor - expected[name])[rows]).norm() <= 1e-5 * expected[name][rows].norm(), name


def test_what_keeps_a_run_from_the_disk_is_named_before_the_model_is_loaded(work) -> None:
    """No such folder, one that cannot be written, no compiler."""
    done = run_program("refused_disks", work, TORCH_EXTENSIONS_DIR=str(work / "extensions"))
    assert done.stdout.splitlines() == ["exit code 2"] * 3, done.stdout + done.stderr
    said = [line for line in done.stderr.splitlines() if "error: " in line]
    expected = (
        "nvme_path missing is not a folder",
        "nvme_path /proc cannot be written",
        "needs an op that DeepSpeed cannot compile",
    )
    for line, what in zip(said, expected, strict=True):
        assert what in line, line
    assert not (work / "refused" / "plan.txt").exists() and not list(work.glob("beingvl-*"))


class SlowCompilation:
    """In place of DeepSpeed's builder, whose compilation cannot be timed."""

    def is_compatible(self, verbose: bool) -> bool:
        return True

    def load(self, verbose: bool) -> None:
        time.sleep(2.5)


def test_a_rank_that_compiles_shows_life_and_says_so(work, monkeypatch, capsys) -> None:
    """It took 13 minutes on a busy machine, and was called a stall."""
    monkeypatch.setattr("deepspeed.ops.op_builder.AsyncIOBuilder", SlowCompilation)
    monkeypatch.setattr(nvme, "gather_objects", lambda value, num_ranks: [value])
    monkeypatch.setattr(nvme, "SECONDS_BEFORE_TELLING", 0)
    config = load_stage_config(
        work / "all.json",
        [f'zero_optimization.offload_param={{"device":"nvme","nvme_path":"{work}"}}'],
    )
    allowed: list[float] = []
    ranks = Ranks(0, 1, torch.device("cpu"))
    with nvme.swap_folders(config, "run", ranks, allowed.append):
        assert allowed == [nvme.LONGEST_COMPILATION_SECONDS, 0]
    assert "rank 0 compiles DeepSpeed's op for NVMe, which takes minutes" in capsys.readouterr().err
    assert not list(work.glob("beingvl-*"))


def test_too_small_a_buffer_is_named() -> None:
    config = parse_stage_config(stage_fields(), "stage.json")
    config.deepspeed["zero_optimization"]["offload_param"] = {
        "device": "nvme",
        "nvme_path": "/",
        "buffer_size": 10,
    }
    with pytest.raises(
        InputError, match="buffer_size is 10, the largest weight's share is 11 elements on 2 ranks"
    ):
        nvme.swap_settings(config, {"a": torch.zeros(3, 7)}, 2)
