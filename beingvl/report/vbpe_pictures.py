"""The pictures of a vBPE vocabulary: tokens as tiles, images with token borders, and charts.
Without a VQ-GAN, every code gets its own colour.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure

from beingvl.artefact.progress import progress
from beingvl.images.pictures import with_borders
from beingvl.images.vqgan import VQGAN
from beingvl.report.kit import GRID, SERIES_COLOURS
from beingvl.vbpe.compression import Compression
from beingvl.vbpe.reference import Cell
from beingvl.vbpe.visual_bpe import VisualBPE, owners

TOKENS_SHOWN = 24
TILE = 88  # pixels of a token's picture
EXAMPLE_SIDE = 512
LONGEST_BAR = 24  # cells; larger tokens share a bar

Pictures: TypeAlias = dict[str, list[tuple[np.ndarray, str]]]
"""By group: pictures `[H, W, 3 or 4]` uint8 and their captions."""


@dataclass
class Sample:
    """Images encoded with the vocabulary. `used` counts each id in the final streams, `applied` how
    often each merge was applied.
    """

    grids: np.ndarray  # [N, H, W]
    ids: np.ndarray  # int32, flat
    offsets: np.ndarray  # int64 [N + 1]
    used: np.ndarray  # int64 [num_ids]
    applied: np.ndarray  # int64 [num_merges]
    is_learnt_from: bool = False

    def stream(self, image: int) -> np.ndarray:
        return self.ids[self.offsets[image] : self.offsets[image + 1]]

    @property
    def num_unused_merges(self) -> int:
        return int((self.used[-len(self.applied) :] == 0).sum()) if len(self.applied) else 0

    @property
    def num_unused_codes(self) -> int:
        return len(self.used) - len(self.applied) - len(np.unique(self.grids))

    @property
    def compression(self) -> Compression:
        return Compression.of(len(self.grids), self.grids.size, self.applied)


# ---- what the page shows ----


def draw_pictures(vbpe: VisualBPE, sample: Sample | None, vq: VQGAN | None) -> Pictures:
    """Pictures and captions: tiles of `largest`, most `used` and `shapes`, and `examples`."""
    merges = np.arange(vbpe.num_codes, vbpe.num_ids)
    used = sample.used[merges] if sample else np.zeros(len(merges), int)
    groups = {"largest": merges[np.lexsort((-used, -vbpe.sizes[merges]))]}
    if sample is not None:
        groups["used"] = merges[np.argsort(-used, kind="stable")]
    pictures: Pictures = {}
    for group, ids in groups.items():
        pictures[group] = []
        shown = ids[:TOKENS_SHOWN].tolist()
        for image_id in progress(shown, name=f"draw {group} tokens", unit="token", leave=False):
            caption = f"id {image_id}\n{vbpe.sizes[image_id]} cells"
            caption += f"\nused {sample.used[image_id]} x" if sample else ""
            pictures[group].append((draw_token(vbpe, image_id, sample, vq), caption))
    pictures["shapes"] = [
        (draw_shape(shape), f"{count} merge{'s' * (count > 1)}")
        for shape, count in count_shapes(vbpe).most_common(TOKENS_SHOWN)
    ]
    if sample is not None:
        pictures["examples"] = [
            (
                draw_example(vbpe, sample, image, vq),
                f"{len(sample.stream(image))} tokens for {sample.grids[0].size} cells",
            )
            for image in example_images(sample)
        ]
    return pictures


def count_shapes(vbpe: VisualBPE) -> Counter[tuple[Cell, ...]]:
    """Number of merges per polyomino, regardless of their codes."""
    shapes: Counter[tuple[Cell, ...]] = Counter()
    for image_id in range(vbpe.num_codes, vbpe.num_ids):
        dy, dx, _ = vbpe.cells(image_id)
        shapes[tuple(zip(dy.tolist(), dx.tolist(), strict=True))] += 1
    return shapes


def example_images(sample: Sample) -> list[int]:
    """Images with the fewest, the median and the most tokens."""
    order = np.argsort(np.diff(sample.offsets), kind="stable")
    return list(dict.fromkeys(order[[0, len(order) // 2, -1]].tolist()))


# ---- pictures ----


def draw_token(
    vbpe: VisualBPE, image_id: int, sample: Sample | None, vq: VQGAN | None
) -> np.ndarray:
    """A token's polyomino in its codes' colours or, with a decoder, its pixels in an image that
    contains it. Like every tile, `[TILE, TILE, 4]` uint8.
    """
    dy, dx, codes = vbpe.cells(image_id)
    cells = np.stack([dy, dx], axis=1)
    if vq is None:
        return draw_tile(cells, code_colours(codes))
    grid, top, left = find_token(vbpe, image_id, sample, vq.grid)
    pixels = vq.decode(grid[None])[0]
    side = pixels.shape[0] // grid.shape[0]
    patches = [
        pixels[(top + y) * side : (top + y + 1) * side, (left + x) * side : (left + x + 1) * side]
        for y, x in cells.tolist()
    ]
    return draw_tile(cells, np.stack(patches))


def draw_shape(shape: tuple[Cell, ...]) -> np.ndarray:
    return draw_tile(np.array(shape), np.full((len(shape), 3), 140, np.uint8))


def find_token(
    vbpe: VisualBPE, image_id: int, sample: Sample | None, grid: tuple[int, int]
) -> tuple[np.ndarray, int, int]:
    """A code grid that contains the token, and its anchor (row, column): a sample image, or a grid
    filled with the token's first code.
    """
    if sample is not None and sample.used[image_id]:
        at = np.argmax(sample.ids == image_id)
        image = int(np.searchsorted(sample.offsets, at, side="right")) - 1
        owner = owners(vbpe, sample.stream(image), *sample.grids.shape[1:])
        anchor = int(np.argmax(owner == at - sample.offsets[image]))
        return np.asarray(sample.grids[image]), *divmod(anchor, owner.shape[1])
    dy, dx, codes = vbpe.cells(image_id)
    filled = np.full(grid, codes[0], np.uint16)
    top = (grid[0] - int(dy.max()) - 1) // 2
    left = (grid[1] - int(dx.max() + dx.min()) - 1) // 2
    filled[top + dy, left + dx] = codes
    return filled, top, left


def code_colours(codes: np.ndarray) -> np.ndarray:
    """uint8 [..., 3]: one colour per code; neighbouring codes get far-apart hues."""
    hue = codes * 0.618033988749895 % 1.0
    saturation = 0.35 + 0.4 * (codes * 0.7548776662 % 1.0)
    value = 0.6 + 0.38 * (codes * 0.5698402910 % 1.0)
    return (hsv_to_rgb(np.stack([hue, saturation, value], axis=-1)) * 255).astype(np.uint8)


def draw_tile(cells: np.ndarray, fills: np.ndarray) -> np.ndarray:
    """A transparent tile with the cells [n, 2] and their border, filled with [n, 3] (colours) or
    [n, side, side, 3] (pixels).
    """
    cells = cells - cells.min(axis=0)
    height, width = cells.max(axis=0) + 1
    size = max(4, height + 2, width + 2)  # of the tile, in cells, with room for the border
    side = max(1, TILE // size)
    cells += [(size - height) // 2, (size - width) // 2]
    tile = np.zeros((size * side, size * side, 4), np.uint8)
    owner = np.full((size, size), -1)
    for (y, x), fill in zip(cells.tolist(), fills, strict=True):
        owner[y, x] = 0
        patch = tile[y * side : (y + 1) * side, x * side : (x + 1) * side]
        if fill.ndim == 1:
            patch = patch[:-1, :-1]  # colours leave a gap between cells, pixels do not
        else:
            at = np.arange(side) * len(fill) // side
            fill = fill[np.ix_(at, at)]
        patch[..., :3], patch[..., 3] = fill, 255
    tile = with_borders(tile, owner, min_side=1, thickness=2)
    step = -(-len(tile) // TILE)  # more than 1 only for a token more than TILE cells wide or high
    tile = tile[::step, ::step]
    before = (TILE - len(tile)) // 2
    after = TILE - len(tile) - before
    return np.pad(tile, ((before, after), (before, after), (0, 0)))


def draw_example(vbpe: VisualBPE, sample: Sample, image: int, vq: VQGAN | None) -> np.ndarray:
    """One image with the borders of its tokens drawn on it, `[H, W, 3]` uint8."""
    grid = sample.grids[image]
    picture = code_colours(grid) if vq is None else vq.decode(grid[None])[0]
    owner = owners(vbpe, sample.stream(image), *grid.shape)
    return with_borders(picture, owner, EXAMPLE_SIDE, thickness=3)


def join_tiles(tiles: Sequence[np.ndarray]) -> np.ndarray:
    """One sheet of tiles on white, eight in a row, `[H, W, 3]` uint8."""
    sheet = np.full((-(-len(tiles) // 8) * TILE, 8 * TILE, 3), 255, np.uint8)
    for number, tile in enumerate(tiles):
        top, left = number // 8 * TILE, number % 8 * TILE
        part, is_drawn = sheet[top : top + TILE, left : left + TILE], tile[..., 3] > 0
        part[is_drawn] = tile[..., :3][is_drawn]
    return sheet


# ---- charts ----


def draw_charts(vbpe: VisualBPE, sample: Sample | None) -> dict[str, Figure]:
    charts = {"sizes": draw_sizes(vbpe, sample)}
    if curves := curves_of(vbpe, sample):
        charts["compression"] = draw_compression(curves)
    return charts


def curves_of(vbpe: VisualBPE, sample: Sample | None) -> dict[str, Compression]:
    """Compression curves, as measured when the vocabulary was learnt, and on the sample. Only the
    first shows the knee: `auto` cuts the vocabulary there, so later curves cover only a part.
    """
    curves = {}
    if held_out := vbpe.parameters.get("held_out"):
        at_training = Compression.from_dict(held_out)
        curves[f"{at_training.num_images:,} images held out when it was learnt"] = at_training
    if sample is not None:
        whose = "it learnt from" if sample.is_learnt_from else "measured"
        curves[f"{len(sample.grids):,} images {whose}"] = sample.compression
    return curves


def draw_sizes(vbpe: VisualBPE, sample: Sample | None) -> Figure:
    """Number of cells per merge and, with a sample, per token in its images."""
    largest = int(vbpe.sizes.max())
    bins = np.arange(1, min(largest, LONGEST_BAR) + 1)
    sizes = np.minimum(vbpe.sizes, bins[-1])
    figure, axes = _new_chart()
    merges = np.bincount(sizes[vbpe.num_codes :], minlength=len(bins) + 1)[1:]
    shares = 100 * merges / max(1, vbpe.num_merges)
    shift, width = (0.2, 0.4) if sample else (0, 0.7)
    axes.bar(bins - shift, shares, width, label="of the merges", color=SERIES_COLOURS[0])
    if sample is not None:
        tokens = np.bincount(sizes, weights=sample.used, minlength=len(bins) + 1)[1:]
        shares = 100 * tokens / max(1, len(sample.ids))
        label = "of the tokens in the images"
        axes.bar(bins + shift, shares, width, label=label, color=SERIES_COLOURS[1])
    last = f"{bins[-1]}+" if largest > bins[-1] else f"{bins[-1]}"
    axes.set_xticks(bins, [*map(str, bins[:-1]), last])
    axes.set(xlabel="cells of a token", ylabel="share (%)")
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return figure


def draw_compression(curves: Mapping[str, Compression]) -> Figure:
    """Tokens per image against merges, with the knee of the first curve."""
    figure, axes = _new_chart()
    for (name, curve), colour in zip(curves.items(), SERIES_COLOURS, strict=False):
        axes.plot(curve.merges, curve.tokens, color=colour, linewidth=2, label=name)
    first = next(iter(curves.values()))
    label = f"knee: {first.knee:,} merges"
    axes.plot([first.knee], [first.at(first.knee)], "o", color=SERIES_COLOURS[0], label=label)
    last = max(curve.merges[-1] for curve in curves.values())
    axes.set(xlabel="merges", ylabel="tokens per image (mean)")
    axes.set(ylim=(0, None), xlim=(0, max(1, last)))
    axes.grid(color=GRID)
    axes.legend(frameon=False, loc="upper right")  # where the curve is not
    return figure


def _new_chart() -> tuple[Figure, Axes]:
    figure = Figure((6.5, 3), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.patch.set_alpha(0)
    return figure, axes
