"""Loss per source equals a plain sample-by-sample computation and training's own validation;
shared work, refusals.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from beingvl.artefact.manifest import verify_folder
from beingvl.commands.main import main
from beingvl.data.arrow_shards import ShardReader
from beingvl.data.loader import shifted_targets
from beingvl.errors import InputError
from beingvl.evaluation.held_out_loss import load_packed, perplexity, standard_error
from beingvl.evaluation.results import read_summary
from tests.model.small_models import family_config
from tests.tiny import LAYOUT, write_model, write_shards


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loss")
    write_model(folder / "model")
    write_shards(folder / "shards", num_samples=40)
    return folder


def evaluate(work: Path, output: Path, *more: str) -> int:
    where = [f"--model={work / 'model'}", f"--data={work / 'shards'}", f"--output_path={output}"]
    return main(["evaluate", *where, "--device=cpu", *more])


def plain_losses(work: Path, loss_on: str) -> list[tuple[str, float, int]]:
    """(source, loss sum, targets) of every sample, one at a time, by stock transformers."""
    from transformers import AutoModelForCausalLM

    model, shards = (
        AutoModelForCausalLM.from_pretrained(work / "model"),
        ShardReader(work / "shards"),
    )
    found = []
    for index in range(len(shards)):
        sample = shards[index]
        targets = torch.from_numpy(shifted_targets(sample, LAYOUT, loss_on))
        with torch.no_grad():
            logits = model(torch.from_numpy(sample.input_ids.astype(np.int64))[None]).logits[0]
        loss = torch.nn.functional.cross_entropy(
            logits, targets, reduction="sum", ignore_index=-100
        )
        found.append((sample.category, float(loss), int((targets >= 0).sum())))
    return found


@pytest.mark.parametrize("loss_on", ["response", "all"])
def test_loss_and_perplexity_equal_a_plain_computation(
    work: Path, tmp_path: Path, loss_on: str
) -> None:
    assert evaluate(work, tmp_path / "eval", f"--loss_on={loss_on}", "--rows_per_part=16") == 0
    scores, plain = read_summary(tmp_path / "eval"), plain_losses(work, loss_on)
    for source, entry in [("", scores["scores"]), *scores["sources"].items()]:
        chosen = [row for row in plain if source in ("", row[0])]
        expected = sum(row[1] for row in chosen) / sum(row[2] for row in chosen)
        assert entry["loss"] == pytest.approx(expected, rel=1e-6)
        assert entry["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
    assert set(scores["sources"]) == {"foundation", "reasoning"} and "vq" in scores["kinds"]
    assert scores["rows"] == 40 and scores["target_tokens"] == sum(row[2] for row in plain)
    with open(tmp_path / "eval" / "samples.jsonl", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    assert [(line["source"], line["target_tokens"]) for line in lines] == [
        (row[0], row[2]) for row in plain
    ]
    assert [line["loss_sum"] for line in lines] == pytest.approx(
        [row[1] for row in plain], rel=1e-5
    )
    verify_folder(tmp_path / "eval")


def test_ranks_share_the_work_and_add_up_the_same(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(work, tmp_path / "one", "--rows_per_part=7", "--limit=30") == 0
    for rank in (1, 0):
        assert (
            evaluate(
                work,
                tmp_path / "two",
                "--rows_per_part=7",
                "--limit=30",
                f"--rank={rank}",
                "--num_ranks=2",
            )
            == 0
        )
    one, two = (read_summary(tmp_path / name) for name in ("one", "two"))
    assert {**one, "name": ""} == {**two, "name": ""} and one["rows"] == 30
    capsys.readouterr()
    assert (
        evaluate(work, tmp_path / "two", "--limit=30") == 0 and "reused" in capsys.readouterr().out
    )


def test_the_perplexity_of_a_huge_loss_is_infinite() -> None:
    assert perplexity(800.0) == math.inf and perplexity(2.0) == math.exp(2)


def test_the_standard_error_treats_a_sample_as_one_draw() -> None:
    """Against the spread of the ratio over many resampled sets."""
    draw = np.random.default_rng(0)
    targets, means = draw.integers(1, 20, 200), draw.normal(2, 0.5, 200)
    samples = [
        {"loss_sum": float(n * m), "target_tokens": int(n)}
        for n, m in zip(targets, means, strict=True)
    ]
    picks = draw.integers(0, 200, (4000, 200))
    ratios = (targets * means)[picks].sum(1) / targets[picks].sum(1)
    assert standard_error(samples) == pytest.approx(ratios.std(), rel=0.05)
    assert standard_error(samples[:1]) == 0.0


def test_refusals(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from beingvl.vocab import VocabLayout

    other = VocabLayout(num_text=258, num_vq=16, num_merges=9, bos_id=256, eos_id=257)
    write_model(tmp_path / "other", other)
    for more, message in [
        ([f"--model={tmp_path / 'other'}"], "different vocab"),
        ([f"--model={tmp_path}"], "it is not a Being-VL model folder"),
        ([f"--data={work / 'model'}"], "holds 'model', expected 'shards'"),
        (["--limit=0"], "--limit is 0"),
        (["--metric=cider"], "--metric has no effect on --data"),
    ]:
        assert evaluate(work, tmp_path / "eval", *more) == 2, message
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("phi", "type 'phi' compute something else"),
        ("mistral", "look back 16 .* score it with --json_path"),
    ],
)
def test_models_that_packing_changes_are_refused(tmp_path: Path, family: str, message: str) -> None:
    family_config(family, LAYOUT.size, LAYOUT.bos_id, LAYOUT.eos_id).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=message):
        load_packed(tmp_path, torch.float32, torch.device("cpu"), longest=17)


def test_shards_without_a_target_have_no_loss(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from beingvl.data.shard_columns import Sample
    from beingvl.data.shard_writer import ShardWriter

    writer = ShardWriter(tmp_path / "shards", LAYOUT)
    writer.add(
        Sample("a", "", "foundation", np.arange(5, dtype=np.int32), np.zeros((0, 2), np.int32))
    )
    writer.finish({"vocab": LAYOUT.fingerprint()}, {})
    assert evaluate(work, tmp_path / "eval", f"--data={tmp_path / 'shards'}") == 2
    assert "has no target token for --loss_on response" in capsys.readouterr().err
