"""What a vBPE vocabulary learnt: report.html, and its pictures as PNG files.

measure         encode images with it, count ids and merges
vbpe_section    facts, compression, examples, most used and largest tokens, sizes, shapes
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from beingvl.artefact.files import write_atomically
from beingvl.artefact.manifest import join_lineages
from beingvl.artefact.owner import owned
from beingvl.errors import InputError, check_at_least
from beingvl.images.pictures import to_png
from beingvl.images.vqgan import VQGAN
from beingvl.report.kit import chart, chart_png, page, render
from beingvl.report.vbpe_pictures import (
    Pictures,
    Sample,
    curves_of,
    draw_charts,
    draw_pictures,
    join_tiles,
)
from beingvl.vbpe.code_files import open_codes, sample_images
from beingvl.vbpe.compression import count_applied
from beingvl.vbpe.train_vbpe import REPORT_FOLDER
from beingvl.vbpe.visual_bpe import VisualBPE


def report_vbpe(
    vbpe: Path | str,
    *,
    codes: Sequence[Path | str] = (),
    vq: Path | str | None = None,
    max_images: int = 2000,
    seed: int = 0,
    output_path: Path | str | None = None,
) -> Path:
    """Write report.html and PNG files into `output_path`, by default `vbpe_report` beside the file;
    returns the folder.

    vbpe: vbpe.json, or its folder. codes: VQ codes to measure on, a sample of `max_images` images.
    vq: a VQ-GAN with a decoder, to show pixels instead of colours. Raises InputError for inputs
    that do not belong together.
    """
    vbpe = Path(vbpe)
    vocabulary = load_own_vbpe(vbpe)
    decoder = load_decoder(vq) if vq else None
    if decoder:
        of_decoder = {"vqgan": decoder.fingerprint()}
        join_lineages({str(vbpe): vocabulary.lineage, str(vq): of_decoder})
    sample = measure(vocabulary, list(map(Path, codes)), max_images, seed) if codes else None
    beside = (vbpe if vbpe.is_dir() else vbpe.parent) / REPORT_FOLDER
    folder = Path(output_path or beside)
    with owned(folder):
        pictures = draw_pictures(vocabulary, sample, decoder)
        charts = draw_charts(vocabulary, sample)
        files = png_files(pictures, charts)
        for name, png in files.items():
            write_atomically(folder / f"{name}.png", png)
        body = vbpe_section(vocabulary, sample, pictures, charts)
        write_atomically(folder / "report.html", page("vBPE vocabulary", body, vocabulary.source))
    print(f"{folder / 'report.html'} and {len(files)} PNG files")
    return folder


def load_own_vbpe(path: Path) -> VisualBPE:
    """Raises InputError for a published vocabulary."""
    vbpe = VisualBPE.load(path)
    if not isinstance(vbpe, VisualBPE):
        raise InputError(
            f"{path} is a published (legacy) vocabulary: its tokens have no fixed shape to show; "
            "train one with `beingvl train-vbpe`"
        )
    return vbpe


def load_decoder(path: Path | str) -> VQGAN:
    vq = VQGAN.load(path)
    if not vq.has_decoder:
        raise InputError(f"{path} has no decoder, so it cannot show pixels; leave it out")
    return vq


# ---- measuring ----


def measure(vbpe: VisualBPE, paths: Sequence[Path], max_images: int, seed: int) -> Sample:
    """Encode a sample of images of one grid size. Raises InputError for codes of a wrong VQ-GAN."""
    check_at_least(1, max_images=max_images)
    codes, names = open_codes(paths, vbpe.num_codes), " and ".join(map(str, paths))
    join_lineages({vbpe.source: vbpe.lineage, names: codes.lineage})
    arrays = sample_images(codes, max_images, seed)
    if len({array.shape[1:] for array in arrays}) > 1:
        raise InputError(
            f"{names} hold grids of several sizes, expected one; report them one by one"
        )
    sample = measure_grids(vbpe, np.concatenate(arrays))
    is_learnt_from = not set(codes.hashes).isdisjoint(vbpe.parameters.get("codes", ()))
    return replace(sample, is_learnt_from=is_learnt_from)


def measure_grids(vbpe: VisualBPE, grids: np.ndarray) -> Sample:
    """Encode codes `[N, H, W]`."""
    ids, offsets = vbpe.encode_batch(grids)
    used = np.bincount(ids, minlength=vbpe.num_ids)
    return Sample(grids, ids, offsets, used, count_applied(vbpe, used))


# ---- the page ----


def vbpe_section(
    vbpe: VisualBPE,
    sample: Sample | None,
    pictures: Pictures,
    charts: Mapping[str, Figure],
    level: int = 2,
) -> Markup:
    """The page's content, with headings of `level`."""
    drawn = {name: chart(figure, name) for name, figure in charts.items()}
    curves = curves_of(vbpe, sample)
    return render(
        "vbpe.html",
        level=level,
        vbpe=vbpe,
        sample=sample,
        curves=curves,
        pictures=pictures,
        charts=drawn,
    )


def png_files(pictures: Pictures, charts: Mapping[str, Figure]) -> dict[str, bytes]:
    """Every picture of the page as a PNG file; the tiles of each group share one sheet."""
    files = {name: chart_png(figure) for name, figure in charts.items()}
    for group, shown in pictures.items():
        if group == "examples":
            files |= {f"example-{number}": to_png(one) for number, (one, _) in enumerate(shown, 1)}
        elif shown:
            files[group] = to_png(join_tiles([tile for tile, _ in shown]))
    return files
