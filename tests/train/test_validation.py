"""A validation pass ends early when any rank is asked to stop. What it computes is tested in
whole runs (test_extras.py).
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from beingvl.data.arrow_shards import ShardReader
from beingvl.data.held_out import pack_in_order
from beingvl.stage.stage_config import load_stage_config
from beingvl.train import validation as validation_module
from beingvl.train.metrics import VALIDATION_FILE, MetricsWriter
from beingvl.train.ranks import Ranks
from beingvl.train.validation import validator
from tests.tiny import stage_fields, write_inputs


@pytest.mark.parametrize("asked_in_batch, num_batches, num_lines", [(2, 2, 0), (None, None, 1)])
def test_a_rank_that_is_asked_to_stop_ends_the_pass(
    tmp_path, capsys, monkeypatch, asked_in_batch, num_batches, num_lines
) -> None:
    """Two ranks, this one and one that is asked in the batch `asked_in_batch`; the sum over both
    stands for the collective.
    """
    folder = write_inputs(tmp_path, all=stage_fields())
    config, shards = load_stage_config(folder / "all.json"), ShardReader(folder / "shards")
    per_rank = -(-len(pack_in_order(shards.lengths, config.beingvl.sequence_length)) // 2)
    assert per_rank > 2
    batches = []
    ranks = Ranks(0, 2, torch.device("cpu"))
    engine = SimpleNamespace(
        ranks=ranks,
        config=config,
        evaluate=lambda batch: batches.append(batch) or torch.ones(batch.num_target_tokens),
    )
    monkeypatch.setattr(
        validation_module,
        "sum_over_ranks",
        lambda values, device: np.asarray(values) + (len(batches) == asked_in_batch),
    )
    monkeypatch.setattr("beingvl.artefact.progress.FIRST_SECONDS", 0)
    (tmp_path / "run").mkdir()
    metrics = MetricsWriter(tmp_path / "run", ranks, 1, 9)
    validator(engine, shards, metrics, lambda: False)(5)
    assert len(batches) == (num_batches or per_rank)
    path = tmp_path / "run" / VALIDATION_FILE
    assert (len(path.read_text().splitlines()) if path.is_file() else 0) == num_lines
    assert f"validation after step 5: 0 of {per_rank} rounds in" in capsys.readouterr().err
