import json
from pathlib import Path

import numpy as np
import pytest

from beingvl.commands import main as cli
from beingvl.data.arrow_shards import ShardReader
from beingvl.data.loader import TrainingData
from beingvl.data.mixture import Mixture
from beingvl.data.shard_columns import Sample
from beingvl.data.shard_writer import ShardWriter
from beingvl.errors import InputError
from beingvl.report.data import ranges_of, report_data, spread_over_sources
from beingvl.vbpe.visual_bpe import VisualBPE
from tests.images.test_encode_images import save_vqgan
from tests.tiny import LAYOUT, write_shards

CONFIGS = Path(__file__).parents[2] / "ds_configs"


def test_the_page_counts_what_is_there_and_what_never_occurs(tmp_path, capsys) -> None:
    write_shards(tmp_path / "shards", num_samples=3)
    assert (
        cli.main(
            [
                "report",
                "data",
                str(tmp_path / "shards"),
                "--output_path",
                str(tmp_path / "page.html"),
            ]
        )
        == 0
    )
    page = (tmp_path / "page.html").read_text()
    assert (
        "foundation" in page and "% full" in page and "<script" not in page and "http" not in page
    )
    assert f"<td>all new rows</td><td>{LAYOUT.num_visual}</td>" in page
    assert cli.main(["report", "data", str(tmp_path / "shards"), "--num_examples", "0"]) == 2
    assert "--num_examples is 0" in capsys.readouterr().err


def test_examples_have_their_text_and_images(inputs, tmp_path) -> None:
    page = tmp_path / "page.html"
    paths = [
        f"--vq_path={inputs}/vqgan",
        f"--vbpe_path={inputs}/vbpe.json",
        f"--model_path={inputs}/base",
    ]
    assert (
        cli.main(["report", "data", str(inputs / "build-shards"), f"--output_path={page}", *paths])
        == 0
    )
    text = page.read_text()
    assert text.count("data:image/png") == 6 and "hi" in text and "yes" in text


def test_what_the_examples_were_not_made_with_is_refused(inputs, tmp_path, capsys) -> None:
    VisualBPE(32, np.array([[0, 1, 0, 1]], np.int32)).save(tmp_path / "vbpe.json")
    save_vqgan(tmp_path / "vqgan", seed=1)
    for option, found in (
        (f"--vbpe_path={tmp_path}/vbpe.json", "different vbpe"),
        (f"--vq_path={tmp_path}/vqgan", "different vqgan"),
        (
            f"--model_path={tmp_path}",
            "has no vocab_layout.json: it is not a Being-VL model folder",
        ),
    ):
        assert (
            cli.main(
                [
                    "report",
                    "data",
                    str(inputs / "build-shards"),
                    f"--output_path={tmp_path}/page.html",
                    option,
                ]
            )
            == 2
        )
        assert found in capsys.readouterr().err


def test_every_image_of_an_example_is_shown(inputs, tmp_path) -> None:
    turns = [{"from": "human", "value": "<image><image> hi"}, {"from": "gpt", "value": "yes"}]
    row = {"id": "both", "image": ["1.png", "2.png"], "conversations": turns}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    command = [
        "tokenize",
        f"--json_path={tmp_path}/rows.json",
        f"--vq_codes={inputs}/encode-images",
        "--format=arrow",
    ]
    command += [
        f"--model_path={inputs}/base",
        f"--vbpe_path={inputs}/vbpe.json",
        f"--output_dir={tmp_path}",
    ]
    assert cli.main(command) == 0
    page = tmp_path / "page.html"
    paths = [
        f"--vq_path={inputs}/vqgan",
        f"--vbpe_path={inputs}/vbpe.json",
        f"--output_path={page}",
    ]
    assert (
        cli.main(["report", "data", f"{tmp_path}/data_base", f"{tmp_path}/data_vbpe", *paths]) == 0
    )
    assert page.read_text().count("data:image/png") == 4


def test_a_folder_of_shard_folders_stands_for_all_of_them(inputs, tmp_path) -> None:
    command = [
        "tokenize",
        f"--json_path={inputs}/rows.json",
        f"--vq_codes={inputs}/encode-images",
        "--format=arrow",
    ]
    command += [
        f"--model_path={inputs}/base",
        f"--vbpe_path={inputs}/vbpe.json",
        f"--output_dir={tmp_path}/out",
    ]
    assert cli.main([*command, "--max_rejected=0.1"]) == 0
    assert (
        cli.main(["report", "data", f"{tmp_path}/out", f"--output_path={tmp_path}/page.html"]) == 0
    )
    page = (tmp_path / "page.html").read_text()
    assert all(f"<h2>{tmp_path}/out/data_{variant}</h2>" in page for variant in ("base", "vbpe"))


def test_what_is_no_shard_folder_says_what_to_give(inputs, tmp_path, capsys) -> None:
    (tmp_path / "stage.json").write_text("{}")
    (tmp_path / "stage-1").mkdir()
    (tmp_path / "stage-1" / "metrics.jsonl").write_text("")
    (tmp_path / "empty").mkdir()
    for path, message in (
        (
            inputs / "tokenize",
            "is not a folder of shards; build shards of its files with `beingvl build-shards`",
        ),
        (inputs / "tokenize" / "data_vbpe.jsonl", "build shards of its files"),
        (inputs / "encode-images", "give shards of samples that were tokenized with it"),
        (inputs / "vqgan", "holds 'vqgan', expected 'shards'"),
        (tmp_path / "stage.json", "this file with --config"),
        (tmp_path / "stage-1", "`beingvl report train` shows a stage"),
        (
            tmp_path / "empty",
            "has no manifest.json, so it is incomplete; make it with `beingvl build-shards`",
        ),
        (tmp_path / "nowhere", "nowhere: No such file or directory"),
    ):
        assert cli.main(["report", "data", str(path), f"--output_path={tmp_path}/page.html"]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_ids_that_never_occur_in_words() -> None:
    words = ["1 to 3", "7", "9 to 10"]
    assert ranges_of(np.array([1, 2, 3, 7, 9, 10])) == words and ranges_of(np.array([], int)) == []


def test_nothing_has_no_bar_and_many_unused_ids_are_folded(tmp_path) -> None:
    ids = np.arange(LAYOUT.first_image_id, LAYOUT.first_vbpe_id, 2, np.int32)
    writer = ShardWriter(tmp_path / "shards", LAYOUT, rows_per_shard=1)
    writer.add(Sample("<b>", "", "foundation", ids, np.array([[1, 2]], np.int32)))
    writer.finish({"vocab": LAYOUT.fingerprint()}, {})
    text = report_data([tmp_path / "shards"], output_path=tmp_path / "page.html").read_text()
    assert text.count('class="bar"') == 2  # its length, and VQ codes alone of the kinds
    unused = [str(one) for one in range(ids[0] + 1, LAYOUT.first_vbpe_id, 2)]
    first, rest = ", ".join(unused[:6]), ", ".join(unused[6:])
    assert f"<details><summary>{first} …</summary>{rest}</details>" in text
    assert "<td>&lt;b&gt;</td>" in text and "<td><b>" not in text


def test_the_mixture_of_a_stage(tmp_path) -> None:
    shards = ShardReader(write_shards(tmp_path / "shards"))
    config, page = tmp_path / "stage.json", tmp_path / "page.html"
    stage = json.loads((CONFIGS / "quickstart-stage1.json").read_text())
    stage |= {"train_batch_size": 4}
    stage["beingvl"] |= {"mixture": {"foundation": 3, "reasoning": 1}, "sequence_length": 40}
    stage["beingvl"]["epochs"] = 3

    def report(**changed: object) -> None:
        config.write_text(json.dumps({**stage, "beingvl": {**stage["beingvl"], **changed}}))
        report_data([tmp_path / "shards"], output_path=page, deepspeed_config=config)

    mixture = Mixture(shards.members, shards.sources, stage["beingvl"]["mixture"], 0)
    whole = TrainingData(shards, mixture, 180, sequence_length=40, sequences_per_step=4)
    for max_steps, steps in ((None, whole.num_steps), (7, 7), (10_000, whole.num_steps)):
        report(max_steps=max_steps)
        sequences = range(4 * steps) if steps == 7 else range(whole.plan.num_sequences)
        drawn = np.concatenate([whole.samples_of(sequence) for sequence in sequences])
        tokens = np.bincount(shards.source_of[drawn], weights=shards.lengths[drawn])
        samples = np.bincount(shards.source_of[drawn])
        shares = [f"{samples[0] / len(drawn):.3%}", f"{tokens[0] / tokens.sum():.3%}"]
        row = ["foundation", "3", f"{samples[0]}", *shares, f"{samples[0] / 40:.2f}"]
        text = page.read_text()
        assert "".join(f"<td>{cell}</td>" for cell in row) in text
        full = f"{whole.plan.efficiency:.2%} full"
        assert f"{steps} steps of 4 sequences of 40 tokens, which are {full}" in text
    with pytest.raises(InputError, match=r"beingvl\.mixture_by"):
        report(mixture_by="rows")
    with pytest.raises(InputError, match="at least one above 0"):
        report(mixture={"foundation": 0})


def test_examples_are_of_every_source() -> None:
    """Ids that repeat their sources in a cycle must not show one source alone."""
    members = [np.arange(source, 400, 4) for source in range(4)]
    assert [
        [index % 4 for index in spread_over_sources(members, count)].count(0)
        for count in (1, 4, 6, 8)
    ] == [1, 1, 2, 2]
    assert len(spread_over_sources([np.arange(1), np.arange(1, 100)], 6)) == 6, (
        "what a small source lacks, others have"
    )
    assert len(spread_over_sources(members, 6)) == 6 and spread_over_sources(
        [np.arange(0), np.arange(1)], 5
    ) == [0]
