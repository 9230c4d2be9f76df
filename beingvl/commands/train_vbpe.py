"""[2] Learn a vBPE vocabulary: vq_codes/ (or .npy files) -> vbpe/ (vbpe.json and a manifest), or
vbpe.json alone.

    beingvl train-vbpe --codes vq_codes/ --output vbpe/ --num_merges 8192

--codes takes folders written by `beingvl encode-images`, .npy files, or folders of .npy files, with
[N, H, W] or [N, H * W] unsigned or signed integers; sizes may differ between files. The learnt
vocabulary is a pure function of codes and options.

With --held_out, or --num_merges auto, it reports where more merges stop paying off: tokens per
held-out image against merges, and the knee of that curve (beingvl/vbpe/compression.py). auto learns
as many merges as the knee says.

`--import_pkl vbpe.pkl` converts a published pickled vocabulary instead of learning one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from beingvl.commands.options import options_of
from beingvl.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--codes", dest="data_path", nargs="+", type=Path, help="VQ codes to learn from")
    output = "folder to write vbpe.json in, or FILE.json without a manifest"
    add("--output", dest="output_path", type=Path, required=True, help=output)
    merges = "merges to learn; auto: as many as pay off on held-out images, up to 8192"
    add("--num_merges", type=number_or_auto, default=8192, metavar="N|auto", help=merges)
    held = "VQ codes of other images to measure on (default for auto: every 20th image)"
    add("--held_out", nargs="+", type=Path, default=[], metavar="CODES", help=held)
    add(
        "--alpha", type=float, default=0.3, help="weight of spatial consistency; 0: frequency alone"
    )
    add("--sigma", type=float, default=1.0, help="tolerated spread of a pair's positions, in cells")
    add("--min_count", type=int, default=2, help="pairs that occur less often are never merged")
    size = "number of VQ codes (default: from the vq_codes folder, else largest code + 1)"
    add("--init_size", type=int, help=size)
    pad = "offset that the files add to each code: they hold code + vocab_pad"
    add("--vocab_pad", type=int, default=0, help=pad)
    end = "one past the largest id in the files, i.e. vocab_pad + init_size (checked)"
    add("--vocab_end", type=int, help=end)
    grid = "grid of [N, H * W] files (default: square)"
    add("--grid", nargs=2, type=int, metavar=("H", "W"), help=grid)
    add("--max_images", type=int, help="learn from a sample of this many images")
    add("--seed", type=int, default=0, help="seed of the sample")
    data = "print the files' contents before learning; checks always run"
    add("--validate_data", action="store_true", help=data)
    save = "save after every MERGES merges (bare: 1000); the same command continues from there"
    add("--save_intermediate", nargs="?", type=int, const=1000, metavar="MERGES", help=save)
    published = "published vocabulary (pickle) to convert; nothing is learnt"
    add("--import_pkl", type=Path, help=published)
    add("--overwrite", action="store_true", help="replace a finished output for different inputs")


def number_or_auto(text: str) -> int | str:
    return text if text == "auto" else int(text)


def run(args: argparse.Namespace) -> None:
    # numba is imported here, so that --help is instant.
    from beingvl.vbpe.train_vbpe import import_vbpe, train_vbpe

    if args.import_pkl:
        options = options_of(args)
        names = ("output_path", "init_size", "vocab_pad", "overwrite")
        import_vbpe(args.import_pkl, **{name: options[name] for name in names})
    elif args.data_path:
        train_vbpe(**options_of(args, "import_pkl"))
    else:
        raise InputError(
            "--codes is missing: give VQ codes to learn from (or --import_pkl to convert a "
            "published vocabulary)"
        )
