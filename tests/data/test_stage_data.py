"""What a stage draws from its shards: the mixture of its JSON, or all in full."""

import json
import re
import shlex

import pytest

from beingvl.commands.main import main
from beingvl.data.arrow_shards import ShardReader
from beingvl.data.shard_columns import Sample
from beingvl.data.shard_writer import ShardWriter
from beingvl.data.stage_data import data_of
from beingvl.errors import InputError
from beingvl.report.data import report_data
from beingvl.stage.mixture import fit_mixture
from beingvl.stage.stage_config import apply_override, parse_stage_config
from tests import launcher
from tests.tiny import LAYOUT, random_samples, stage_fields, write_model

IN_FULL = "no dataset row names a category: the stage trains on all 30 samples in full"
MIXTURE = {"foundation": 0.8, "perception": 0.2}


def write_shards(folder, sources: dict[str, int], names_categories: bool) -> ShardReader:
    """Samples of each source: so many."""
    writer = ShardWriter(folder, LAYOUT)
    categories = [name for name, count in sources.items() for _ in range(count)]
    samples = random_samples(LAYOUT, [(12, 6)] * len(categories))
    for number, (sample, category) in enumerate(zip(samples, categories, strict=True)):
        writer.add(Sample(str(number), "", category, sample.input_ids, sample.target_spans))
    lineage = {"vocab": LAYOUT.fingerprint()}
    writer.finish(lineage, {"names_categories": names_categories})
    return ShardReader(folder)


def config(**block):
    return parse_stage_config(stage_fields(**{"mixture": MIXTURE, **block}), "stage.json")


@pytest.mark.parametrize("by", ["samples", "tokens"])
@pytest.mark.parametrize("sources", [{"instruction": 30}, {"default": 10, "instruction": 20}])
def test_rows_without_categories_are_trained_on_in_full(tmp_path, sources, by) -> None:
    shards = write_shards(tmp_path, sources, names_categories=False)
    fitted, note = fit_mixture(config(mixture_by=by), shards.manifest)
    assert set(fitted.beingvl.mixture) == set(sources) and note.startswith(IN_FULL)
    assert fit_mixture(fitted, shards.manifest) == (fitted, "")
    data = data_of(config(mixture_by=by, epochs=1), shards)
    drawn = data.mixture.draw(0, 30).tolist()
    assert len(set(drawn)) >= 28  # all but what a block's shuffle leaves between two sources
    assert len(set(drawn)) == 30 or len(sources) > 1


def test_a_mixture_that_the_shards_hold_is_drawn(tmp_path) -> None:
    shards = write_shards(tmp_path, {"foundation": 20, "perception": 10}, names_categories=False)
    assert fit_mixture(config(), shards.manifest) == (config(), "")


@pytest.mark.parametrize(
    ("sources", "fitting"),
    [
        ({"foundation": 10, "it's": 20}, {"foundation": 0.8}),
        ({"it's": 10, "b": 20}, {"b": 20, "it's": 10}),
    ],
)
def test_a_missing_source_is_refused_with_the_override_that_works(
    tmp_path, sources, fitting
) -> None:
    shards = write_shards(tmp_path, sources, names_categories=True)
    with pytest.raises(InputError, match="names the source '") as refused:
        fit_mixture(config(), shards.manifest)
    words = shlex.split(re.sub(".*--set", "--set", str(refused.value)))
    fields = stage_fields(mixture=MIXTURE)
    apply_override(fields, words[1])
    fitted = parse_stage_config(fields, "stage.json")
    assert fitted.beingvl.mixture == fitting
    assert fit_mixture(fitted, shards.manifest) == (fitted, "")


def words_of(work, command: str) -> list[str]:
    paths = {"stage": work / "all.json", "model": work / "base", "data": work / "shards"}
    if command == "preflight":
        (work / "hostfile").write_text("localhost slots=1\n")
        paths |= {"hostfile": work / "hostfile", "seconds": 0, "master_port": launcher.free_port()}
    if command == "plan":
        paths["gpus"] = "1x80GB"
    return [command, *(word for name, value in paths.items() for word in (f"--{name}", str(value)))]


@pytest.fixture
def work(tmp_path):
    write_model(tmp_path / "base")
    (tmp_path / "all.json").write_text(json.dumps(stage_fields(mixture=MIXTURE)))
    return tmp_path


def test_plan_preflight_report_and_training_say_that_it_is_in_full(work, capsys) -> None:
    write_shards(work / "shards", {"foundation": 30}, names_categories=False)
    for command in ("plan", "preflight"):
        main(words_of(work, command))
        assert IN_FULL in capsys.readouterr().out
    page = report_data(
        [work / "shards"], output_path=work / "page.html", deepspeed_config=work / "all.json"
    )
    assert IN_FULL in page.read_text()
    done = launcher.run_alone(work, work / "stage-1")
    assert done.returncode == 0, done.stderr
    assert IN_FULL in done.stdout.splitlines()[0]
    assert (work / "stage-1/final/manifest.json").is_file()


def test_all_four_refuse_a_missing_source_with_the_same_sentence(work, capsys) -> None:
    write_shards(work / "shards", {"foundation": 30}, names_categories=True)
    override = """--set 'beingvl.mixture={"foundation": 0.8}'"""
    assert main(words_of(work, "plan")) == 2
    assert override in capsys.readouterr().err
    assert main(words_of(work, "preflight")) == 1
    assert override in capsys.readouterr().out
    report = ["report", "data", str(work / "shards"), f"--deepspeed_config={work}/all.json"]
    report.append(f"--output_path={work}/page.html")
    assert main(report) == 2
    assert override in capsys.readouterr().err
    assert main([*report, *shlex.split(override)]) == 0
    trainer = launcher.stage_words(
        work / "all.json", work / "base", work / "shards", work / "stage-1"
    )
    assert main(["launch", f"--hostfile={work}/hostfile", "--", *trainer]) == 2
    assert override in capsys.readouterr().err
    done = launcher.run_alone(work, work / "stage-1")
    assert done.returncode == 2 and override in done.stderr
