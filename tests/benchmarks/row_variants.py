"""Two ways to train merged tokens that `positions --tried` compares with plain rows.

sum_rows              a merge's row is a learnt part plus the mean of its codes' rows
write_segmentations   images several times, each with other tokens taken apart (merge dropout,
                      as BPE-dropout of arXiv 1910.13267)
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

from beingvl.data.arrow_shards import ShardReader
from beingvl.data.shard_writer import ShardWriter
from beingvl.vbpe.visual_bpe import VisualBPE


class _PlusItsCodes(nn.Module):
    """Learnt parts `[num_rows, hidden]` <-> rows of the same shape, which differ for merges."""

    def __init__(self, vbpe: VisualBPE, num_rows: int) -> None:
        super().__init__()
        first = num_rows - vbpe.num_ids  # behind the special tokens
        self.codes = slice(first, first + vbpe.num_codes)
        shares = torch.zeros(num_rows, vbpe.num_codes)
        for image_id in range(vbpe.num_codes, vbpe.num_ids):
            codes = torch.from_numpy(vbpe.cells(image_id)[2]).long()
            shares[first + image_id] = codes.bincount(minlength=vbpe.num_codes) / len(codes)
        self.register_buffer("shares", shares)

    def forward(self, learnt: torch.Tensor) -> torch.Tensor:
        return learnt + self.shares @ learnt[self.codes]

    def right_inverse(self, rows: torch.Tensor) -> torch.Tensor:
        return rows - self.shares @ rows[self.codes]


def sum_rows(embedding: nn.Embedding, vbpe: VisualBPE) -> None:
    """Its output is at first what it was."""
    sums = _PlusItsCodes(vbpe, len(embedding.weight))
    parametrize.register_parametrization(embedding, "weight", sums)


def write_segmentations(
    shards: ShardReader, vbpe: VisualBPE, folder: Path, copies: int, share: float, seed: int
) -> None:
    """Every row `copies` times: as it is, and then with `share` of its merges undone at random."""
    random, writer = np.random.default_rng(seed), ShardWriter(folder, shards.layout)
    for copy in range(copies):
        for number in range(len(shards)):
            row = shards[number]
            ids, spans = row.input_ids, row.target_spans
            if copy:
                at = np.flatnonzero(shards.layout.is_image_token(ids))
                first, end = at[0], at[-1] + 1  # one image per row, before its answer
                image_ids = shards.layout.image_ids_in_row(ids[first:end])
                parts = taken_apart(vbpe, image_ids, share, random) + (ids[first] - image_ids[0])
                spans = spans + (len(parts) - len(image_ids)) * (spans >= end)
                ids = np.concatenate([ids[:first], parts.astype(np.int32), ids[end:]])
            writer.add(row._replace(id=f"{number}-{copy}", input_ids=ids, target_spans=spans))
    writer.finish(dict(shards.manifest.lineage), dict(shards.manifest.details))


def taken_apart(
    vbpe: VisualBPE, ids: np.ndarray, share: float, random: np.random.Generator
) -> np.ndarray:
    """Another stream `[more]` of the square grid that `ids` `[n]` stand for."""
    side = round(float(vbpe.sizes[ids].sum()) ** 0.5)
    covered, found, cell = np.zeros((side, side), bool), {}, 0
    for image_id in ids.tolist():
        while covered.flat[cell]:
            cell += 1
        dy, dx, _ = vbpe.cells(image_id)
        covered[cell // side + dy, cell % side + dx] = True
        tokens = [(cell // side, cell % side, image_id)]
        while tokens:
            y, x, token = tokens.pop()
            if token >= vbpe.num_codes and random.random() < share:
                a, b, dy, dx = vbpe.merges[token - vbpe.num_codes].tolist()
                tokens += [(y, x, a), (y + dy, x + dx, b)]
            else:
                found[y, x] = token
    return np.array([found[place] for place in sorted(found)], np.int32)
