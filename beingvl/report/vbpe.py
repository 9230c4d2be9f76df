"""What a vBPE vocabulary learnt, as one self-contained HTML page and the PNG files in it.

    beingvl report vbpe vbpe.json [--codes vq_codes/] [--vq vq/]

With --codes: compression against number of merges, most used tokens, example images with their
tokens' borders. With --vq as well, tokens and examples are shown as pixels; otherwise every code
has a colour of its own.
"""

from __future__ import annotations

import argparse
import base64
import io
import re
from collections import Counter
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from beingvl.artefact.files import write_atomically
from beingvl.artefact.manifest import join_lineages
from beingvl.errors import InputError
from beingvl.images.vqgan import VQGAN
from beingvl.vbpe.reference import Cell
from beingvl.vbpe.train_vbpe import open_codes, sample_images
from beingvl.vbpe.visual_bpe import VisualBPE, owners

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d1d9e0; --paper: #fff }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d; --paper: #0d1117 } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper) }
body { max-width: 66rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
p, figcaption { color: var(--soft) } figure { margin: 0 } svg, img { max-width: 100%; height: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td { padding: .3rem 1.2rem .3rem 0; border-bottom: 1px solid var(--line) }
.tokens { display: flex; flex-wrap: wrap; gap: .9rem } .tokens figcaption { font-size: .8rem; line-height: 1.3 }
.examples { display: flex; flex-wrap: wrap; gap: 1rem } .examples figure { flex: 1 1 18rem }
"""
GREY = "#808890"  # axes and text of the charts: readable on white and on black
TOKENS_SHOWN = 24
TILE = 88  # pixels of a token's picture


def run(args: argparse.Namespace) -> None:
    vbpe = VisualBPE.load(args.vbpe)
    if not isinstance(vbpe, VisualBPE):
        raise InputError(
            f"{vbpe.source} is a published (legacy) vocabulary: its tokens have no fixed "
            "shape to show"
        )
    vq = _load_decoder(args.vq) if args.vq else None
    if vq:
        join_lineages({str(args.vbpe): vbpe.lineage, str(args.vq): {"vqgan": vq.fingerprint()}})
    sample = measure(vbpe, args.codes, args.max_images, args.seed) if args.codes else None
    folder = (
        args.output_path or (args.vbpe if args.vbpe.is_dir() else args.vbpe.parent) / "vbpe_report"
    )
    folder.mkdir(parents=True, exist_ok=True)
    pictures = draw_pictures(vbpe, sample, vq)
    for name, image in join_tiles(pictures).items():
        write_atomically(folder / f"{name}.png", _png(image))
    charts = draw_charts(vbpe, sample)
    for name, figure in charts.items():
        write_atomically(folder / f"{name}.png", chart_png(figure))
    write_atomically(folder / "report.html", page(vbpe, sample, pictures, charts))
    print(f"{folder / 'report.html'} and {len(list(folder.glob('*.png')))} PNG files")


def _load_decoder(path: Path) -> VQGAN:
    vq = VQGAN.load(path)
    if not vq.has_decoder:
        raise InputError(f"{path} has no decoder, so it cannot show pixels: leave out --vq")
    return vq


# ---- measuring ----


@dataclass
class Sample:
    """Images encoded with the vocabulary. `used` counts every id's part in the final streams,
    `applied` how often a merge ran.
    """

    grids: np.ndarray  # [N, H, W]
    ids: np.ndarray  # int32, flat
    offsets: np.ndarray  # int64 [N + 1]
    used: np.ndarray  # int64 [num_ids]
    applied: np.ndarray  # int64 [num_merges]

    def stream(self, image: int) -> np.ndarray:
        return self.ids[self.offsets[image] : self.offsets[image + 1]]


def measure(vbpe: VisualBPE, paths: list[Path], max_images: int, seed: int) -> Sample:
    """Encode a sample of images of one grid size. Raises InputError for codes of another code
    book or VQ-GAN.
    """
    if max_images < 1:
        raise InputError(f"--max_images is {max_images}, expected at least 1")
    codes = open_codes(paths, vbpe.num_codes)
    join_lineages({vbpe.source: vbpe.lineage, " and ".join(map(str, paths)): codes.lineage})
    arrays = sample_images(codes, max_images, seed)
    if len({array.shape[1:] for array in arrays}) > 1:
        raise InputError(
            f"{' and '.join(map(str, paths))} hold grids of several sizes, expected one: "
            "report them one by one"
        )
    return measure_grids(vbpe, np.concatenate(arrays))


def measure_grids(vbpe: VisualBPE, grids: np.ndarray) -> Sample:
    """Encode codes `[N, H, W]`."""
    ids, offsets = vbpe.encode_batch(grids)
    used = np.bincount(ids, minlength=vbpe.num_ids)
    return Sample(grids, ids, offsets, used, count_applied(vbpe, used))


def count_applied(vbpe: VisualBPE, used: np.ndarray) -> np.ndarray:
    """How often every merge was applied, int64 [num_merges]: each token of the final streams
    applied all merges it is made of.
    """
    total = used.copy()
    for rank in range(vbpe.num_merges - 1, -1, -1):
        a, b = vbpe.merges[rank, :2]
        total[a] += total[vbpe.num_codes + rank]
        total[b] += total[vbpe.num_codes + rank]
    return total[vbpe.num_codes :]


def tokens_by_merges(sample: Sample) -> np.ndarray:
    """Mean tokens per image after 0, 1, … merges, float64 [num_merges + 1]."""
    return (sample.grids.size - np.concatenate([[0], np.cumsum(sample.applied)])) / len(
        sample.grids
    )


def count_shapes(vbpe: VisualBPE) -> Counter[tuple[Cell, ...]]:
    """How many merges have each polyomino, whatever their codes."""
    shapes: Counter[tuple[Cell, ...]] = Counter()
    for image_id in range(vbpe.num_codes, vbpe.num_ids):
        dy, dx, _ = vbpe.cells(image_id)
        shapes[tuple(zip(dy.tolist(), dx.tolist(), strict=True))] += 1
    return shapes


# ---- pictures ----


def draw_pictures(
    vbpe: VisualBPE, sample: Sample | None, vq: VQGAN | None
) -> dict[str, Image.Image]:
    """Every picture of the page by name: `largest-n`, `used-n`, `shape-n`, `example-n`."""
    pictures: dict[str, Image.Image] = {}
    merges = np.arange(vbpe.num_codes, vbpe.num_ids)
    groups = {"largest": merges[np.argsort(-vbpe.sizes[merges], kind="stable")]}
    if sample is not None:
        groups["used"] = merges[np.argsort(-sample.used[merges], kind="stable")]
        groups["largest"] = merges[np.lexsort((-sample.used[merges], -vbpe.sizes[merges]))]
    for group, ids in groups.items():
        for image_id in ids[:TOKENS_SHOWN].tolist():
            pictures[f"{group}-{image_id}"] = draw_token(vbpe, image_id, sample, vq)
    for number, (shape, _) in enumerate(count_shapes(vbpe).most_common(TOKENS_SHOWN)):
        cells = np.array(shape)
        pictures[f"shape-{number}"] = _tile(cells, np.full((len(cells), 3), 140, np.uint8))
    if sample is not None:
        for image in example_images(sample):
            pictures[f"example-{image}"] = draw_example(vbpe, sample, image, vq)
    return pictures


def example_images(sample: Sample) -> list[int]:
    """Rows with the fewest, the median and the most tokens."""
    order = np.argsort(np.diff(sample.offsets), kind="stable")
    return list(dict.fromkeys(order[[0, len(order) // 2, -1]].tolist()))


def draw_token(
    vbpe: VisualBPE, image_id: int, sample: Sample | None, vq: VQGAN | None
) -> Image.Image:
    """A token's polyomino: its codes' colours or, with a decoder, its pixels in an image that
    has it.
    """
    dy, dx, codes = vbpe.cells(image_id)
    cells = np.stack([dy, dx], axis=1)
    if vq is None:
        return _tile(cells, code_colours(codes))
    grid, top, left = _context(vbpe, image_id, sample, vq.grid)
    pixels = vq.decode(grid[None])[0]
    side = pixels.shape[0] // grid.shape[0]
    patches = [
        pixels[(top + y) * side : (top + y + 1) * side, (left + x) * side : (left + x + 1) * side]
        for y, x in cells.tolist()
    ]
    return _tile(cells, np.stack(patches))


def _context(
    vbpe: VisualBPE, image_id: int, sample: Sample | None, grid: tuple[int, int]
) -> tuple[np.ndarray, int, int]:
    """A code grid with the token in it, and its anchor (row, column): a sample image, or the
    token among its first code.
    """
    if sample is not None and sample.used[image_id]:
        image = (
            int(np.searchsorted(sample.offsets, np.argmax(sample.ids == image_id), side="right"))
            - 1
        )
        stream = sample.stream(image)
        position = int(np.argmax(stream == image_id))
        owner = owners(vbpe, stream, *sample.grids.shape[1:])
        top, left = divmod(int(np.argmax(owner == position)), owner.shape[1])
        return np.asarray(sample.grids[image]), top, left
    dy, dx, codes = vbpe.cells(image_id)
    filled = np.full(grid, codes[0], np.uint16)
    top, left = (
        (grid[0] - int(dy.max()) - 1) // 2,
        (grid[1] - int(dx.max()) + int(-dx.min()) - 1) // 2,
    )
    filled[top + dy, left + dx] = codes
    return filled, top, left


def code_colours(codes: np.ndarray) -> np.ndarray:
    """uint8 [..., 3]: one colour per code; neighbouring codes get far-apart hues."""
    hue = codes * 0.618033988749895 % 1.0
    saturation = 0.35 + 0.4 * (codes * 0.7548776662 % 1.0)
    value = 0.6 + 0.38 * (codes * 0.5698402910 % 1.0)
    return (hsv_to_rgb(np.stack([hue, saturation, value], axis=-1)) * 255).astype(np.uint8)


def _tile(cells: np.ndarray, fills: np.ndarray) -> Image.Image:
    """A transparent tile with the border of cells [n, 2], filled with [n, 3] (colours) or [n,
    side, side, 3] (pixels).
    """
    cells = cells - cells.min(axis=0)
    height, width = (int(extent) + 1 for extent in cells.max(axis=0))
    side = max(2, min(22, (TILE - 4) // max(height, width)))
    tile = Image.new("RGBA", (max(TILE, width * side + 4), max(TILE, height * side + 4)))
    top, left = (tile.height - height * side) // 2, (tile.width - width * side) // 2
    owner = np.full((height + 2, width + 2), -1)
    for (y, x), fill in zip(cells.tolist(), fills, strict=True):
        owner[y + 1, x + 1] = 0
        patch = Image.fromarray(fill if fill.ndim == 3 else fill.reshape(1, 1, 3))
        # Colours leave a gap between cells, pixels none.
        shown = side if fill.ndim == 3 else side - 1
        tile.paste(
            patch.resize((shown, shown), Image.Resampling.BILINEAR),
            (left + x * side, top + y * side),
        )
    draw_borders(tile, owner, side, top - side, left - side, 2)
    return tile.resize((TILE, TILE))


def draw_borders(
    image: Image.Image, owner: np.ndarray, side: int, top: int, left: int, thickness: int
) -> None:
    """Draw a line wherever two neighbouring cells of `owner` [H, W] differ: white with a dark
    core, visible on any picture.
    """
    draw = ImageDraw.Draw(image)
    lines = [
        (y, x + 1, y + 1, x + 1) for y, x in np.argwhere(owner[:, :-1] != owner[:, 1:]).tolist()
    ]
    lines += [(y + 1, x, y + 1, x + 1) for y, x in np.argwhere(owner[:-1] != owner[1:]).tolist()]
    for colour, width in (("white", thickness + 1), ("#202020", max(1, thickness - 1))):
        for y, x, end_y, end_x in lines:
            draw.line(
                (left + x * side, top + y * side, left + end_x * side, top + end_y * side),
                colour,
                width,
            )


def draw_example(vbpe: VisualBPE, sample: Sample, image: int, vq: VQGAN | None) -> Image.Image:
    """One image with the borders of its tokens drawn on it."""
    grid = sample.grids[image]
    side = max(4, min(20, 640 // max(grid.shape)))
    size = (grid.shape[1] * side, grid.shape[0] * side)
    if vq is None:
        picture = Image.fromarray(code_colours(grid)).resize(size, Image.Resampling.NEAREST)
    else:
        picture = Image.fromarray(vq.decode(grid[None])[0]).resize(size, Image.Resampling.BICUBIC)
    draw_borders(picture, owners(vbpe, sample.stream(image), *grid.shape), side, 0, 0, 1)
    return picture


def join_tiles(pictures: dict[str, Image.Image]) -> dict[str, Image.Image]:
    """The pictures that become files: examples as they are, the tiles of each group on one
    sheet.
    """
    files = {name: image for name, image in pictures.items() if name.startswith("example-")}
    for group in ("largest", "used", "shape"):
        tiles = [image for name, image in pictures.items() if name.startswith(f"{group}-")]
        if tiles:
            files[group] = Image.new("RGBA", (8 * TILE, -(-len(tiles) // 8) * TILE), "white")
            for number, tile in enumerate(tiles):
                files[group].alpha_composite(tile, (number % 8 * TILE, number // 8 * TILE))
    return files


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


# ---- charts ----


def draw_charts(vbpe: VisualBPE, sample: Sample | None) -> dict[str, Figure]:
    """Every chart by name."""
    sizes = vbpe.sizes
    largest = int(sizes.max())
    charts: dict[str, Figure] = {}
    figure = Figure((9, 3.2), layout="constrained")
    axes = figure.subplots()
    bins = np.arange(1, min(largest, 24) + 1)
    clipped = np.minimum(sizes, bins[-1])
    merges = np.bincount(clipped[vbpe.num_codes :], minlength=len(bins) + 1)[1:] / max(
        1, vbpe.num_merges
    )
    axes.bar(
        bins - (0.2 if sample else 0),
        merges * 100,
        0.4 if sample else 0.7,
        label="of the merges",
        color="#4c8eda",
    )
    if sample is not None:
        tokens = np.bincount(clipped, weights=sample.used, minlength=len(bins) + 1)[1:] / max(
            1, sample.used.sum()
        )
        axes.bar(
            bins + 0.2, tokens * 100, 0.4, label="of the tokens in the images", color="#e0883a"
        )
    labels = [f"{size}" for size in bins[:-1]] + [
        f"{bins[-1]}+" if largest > bins[-1] else f"{bins[-1]}"
    ]
    axes.set_xticks(bins, labels)
    axes.set(xlabel="cells of a token", ylabel="share (%)")
    axes.legend(frameon=False, labelcolor=GREY, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    charts["sizes"] = figure
    if sample is not None:
        figure = Figure((9, 3.2), layout="constrained")
        axes = figure.subplots()
        axes.plot(tokens_by_merges(sample), color="#4c8eda", linewidth=2)
        axes.set(
            xlabel="merges",
            ylabel="tokens per image (mean)",
            ylim=(0, None),
            xlim=(0, max(1, vbpe.num_merges)),
        )
        axes.grid(color=GREY, alpha=0.25)
        charts["compression"] = figure
    for figure in charts.values():
        for axes in figure.axes:
            axes.patch.set_alpha(0)
            axes.tick_params(colors=GREY)
            axes.xaxis.label.set_color(GREY)
            axes.yaxis.label.set_color(GREY)
            for name, spine in axes.spines.items():
                spine.set_visible(name in ("left", "bottom"))
                spine.set_color(GREY)
        figure.patch.set_alpha(0)
    return charts


def chart_svg(figure: Figure, name: str) -> str:
    """SVG text to put into a page: no second file, no metadata, no XML names. `name` makes the
    ids in it its own.
    """
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", dpi=130, facecolor="none", metadata={"Date": None})
    text = buffer.getvalue()
    return re.sub(
        r"<metadata>.*?</metadata>| xmlns(:xlink)?=\"[^\"]*\"",
        "",
        text[text.index("<svg") :],
        flags=re.DOTALL,
    )


def chart_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, facecolor="white")
    return buffer.getvalue()


# ---- the page ----


def page(
    vbpe: VisualBPE,
    sample: Sample | None,
    pictures: dict[str, Image.Image],
    charts: dict[str, Figure],
) -> str:
    """The whole HTML page; nothing in it is loaded from elsewhere."""
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>vBPE report</title>"
    ]
    parts += [
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<style>{STYLE}</style></head><body>",
    ]
    parts += [
        f"<h1>vBPE vocabulary</h1><p>{escape(str(vbpe.source))}</p>",
        body(vbpe, sample, pictures, charts),
    ]
    return "\n".join([*parts, "</body></html>\n"])


def body(
    vbpe: VisualBPE,
    sample: Sample | None,
    pictures: dict[str, Image.Image],
    charts: dict[str, Figure],
) -> str:
    """What the page says, as HTML to put into any page that has its `.tokens` and `.examples`
    styles.
    """
    shown = {name: base64.b64encode(_png(image)).decode() for name, image in pictures.items()}
    parts = [facts(vbpe, sample)]
    if sample is not None:
        parts += [
            "<h2>Tokens per image after the first n merges</h2>",
            chart_svg(charts["compression"], "compression"),
        ]
        parts += [
            "<h2>Images with the fewest, the median and the most tokens</h2><div class='examples'>"
        ]
        for name in (name for name in shown if name.startswith("example-")):
            length, cells = len(sample.stream(int(name.split("-")[1]))), sample.grids[0].size
            parts.append(_figure(shown[name], f"{length} tokens for {cells} cells"))
        parts.append("</div><h2>Most used merged tokens</h2><div class='tokens'>")
        parts += token_figures(vbpe, sample, shown, "used")
        parts.append("</div>")
    parts.append("<h2>Largest tokens</h2><div class='tokens'>")
    parts += token_figures(vbpe, sample, shown, "largest")
    parts += [
        "</div><h2>Sizes</h2>",
        chart_svg(charts["sizes"], "sizes"),
        "<h2>Most frequent shapes</h2><div class='tokens'>",
    ]
    for number, (_, count) in enumerate(count_shapes(vbpe).most_common(TOKENS_SHOWN)):
        parts.append(_figure(shown[f"shape-{number}"], f"{count} merges"))
    return "\n".join([*parts, "</div>"])


def token_figures(
    vbpe: VisualBPE, sample: Sample | None, shown: dict[str, str], group: str
) -> list[str]:
    figures = []
    for name in (name for name in shown if name.startswith(f"{group}-")):
        image_id = int(name.split("-")[1])
        caption = f"id {image_id}<br>{vbpe.sizes[image_id]} cells"
        figures.append(
            _figure(
                shown[name], caption + (f"<br>used {sample.used[image_id]} x" if sample else "")
            )
        )
    return figures


def _figure(data: str, caption: str) -> str:
    return (
        f"<figure><img src='data:image/png;base64,{data}' "
        f"alt=''><figcaption>{caption}</figcaption></figure>"
    )


def facts(vbpe: VisualBPE, sample: Sample | None) -> str:
    rows = [
        ("codes", vbpe.num_codes),
        ("merges", vbpe.num_merges),
        ("largest token", f"{vbpe.sizes.max()} cells"),
    ]
    rows += [
        (name, vbpe.parameters[name])
        for name in ("alpha", "sigma", "min_count", "num_images")
        if name in vbpe.parameters
    ]
    if sample is not None:
        cells, tokens = sample.grids.size, len(sample.ids)
        rows += [
            (
                "images measured",
                f"{len(sample.grids)} of {sample.grids.shape[1]} x {sample.grids.shape[2]} cells",
            )
        ]
        rows += [
            ("tokens per image", f"{tokens / len(sample.grids):.1f}"),
            ("compression", f"{cells / tokens:.3f} cells per token"),
        ]
        rows += [
            (
                "merged ids never used in these images",
                f"{(sample.used[vbpe.num_codes :] == 0).sum()}",
            )
        ]
        rows += [
            (
                "codes never used in these images",
                f"{vbpe.num_codes - len(set(sample.grids.ravel().tolist()))}",
            )
        ]
    return (
        "<table>"
        + "".join(
            f"<tr><td>{escape(name)}</td><td>{escape(str(value))}</td></tr>" for name, value in rows
        )
        + "</table>"
    )
