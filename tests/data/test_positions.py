"""Where image tokens stand is said by tokenize, kept by shards, and changes no byte of them."""

import json
from pathlib import Path

import numpy as np
import pytest

from beingvl.artefact.manifest import read_manifest
from beingvl.commands.main import main
from beingvl.data.arrow_shards import ShardReader
from beingvl.data.held_out import held_out_batch
from beingvl.data.tokenize_dataset import tokenize
from beingvl.errors import InputError
from tests.tiny import (
    LAYOUT,
    write_image_shards,
    write_model,
    write_vbpe_inside,
)

ROWS = [{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]}]


def files(folder: Path) -> dict[str, bytes]:
    """All but the manifest, and the card, which are of more than the shards' bytes."""
    own = (path for path in folder.glob("*") if path.suffix not in (".json", ".md"))
    return {path.name: path.read_bytes() for path in own}


def test_new_rows_stand_at_anchors_where_the_model_has_its_shapes(tmp_path, capsys) -> None:
    rows, base = tmp_path / "rows.json", write_model(tmp_path / "base")
    rows.write_text(json.dumps(ROWS * 3))
    said = {}
    for name in ("without", "with"):
        if name == "with":
            write_vbpe_inside(base)
        for template in ("default", "being-vl-0.5"):
            folder = tmp_path / f"{name}-{template}"
            made = tokenize(rows, base, folder, template=template, format="arrow")
            shards = read_manifest(folder / "data_base")
            said[name, template] = shards.details["image_positions"]
            assert made.details["image_positions"] == said[name, template]
    kinds = {("with", "default"): "anchor"}
    assert said == {key: kinds.get(key, "running") for key in said}
    asked = tmp_path / "asked"
    tokenize(rows, base, asked, image_positions="running", format="arrow")
    assert files(asked / "data_base") == files(tmp_path / "with-default" / "data_base")

    for kind in ("running", "anchor"):
        tokenize(rows, base, tmp_path / kind, image_positions=kind)
    words = [str(tmp_path / kind / "data_base.jsonl") for kind in ("running", "anchor")]
    build = ["build-shards", "--duplicate_ids=keep", "--num_workers=0", f"--output_path={asked}-2"]
    assert main([*build, "--jsonl_path", *words]) == 2
    assert "a stage has one kind of image positions" in capsys.readouterr().err
    assert main([*build, "--jsonl_path", *words, "--image_positions=anchor"]) == 0
    assert read_manifest(Path(f"{asked}-2")).details["image_positions"] == "anchor"


def test_a_packed_batch_has_the_positions_of_its_samples(tmp_path) -> None:
    base = write_model(tmp_path / "base")
    vbpe = write_vbpe_inside(base)
    running = ShardReader(write_image_shards(tmp_path / "old", vbpe), base)
    shards = write_image_shards(tmp_path / "shards", vbpe, image_positions="anchor")
    anchor = ShardReader(shards, base)
    for reader, begin_of_text in ((running, None), (anchor, 18)):
        batch = held_out_batch(reader, [0, 2], "response")
        for place, index in enumerate([0, 2]):
            ids = reader[index].input_ids
            part = slice(*batch.cu_seqlens[place : place + 2].tolist())
            positions = batch.position_ids[part]
            end_of_image = int(np.flatnonzero(ids == LAYOUT.eoi_id)[0])
            assert positions[end_of_image] == (begin_of_text or end_of_image)
            assert (np.diff(positions[end_of_image:]) == 1).all()
    with pytest.raises(InputError, match="does not fill a square grid"):
        held_out_batch(
            ShardReader(shards), range(9), "response"
        )  # of no model, as report opens them
