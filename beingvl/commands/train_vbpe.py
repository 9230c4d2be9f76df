"""[2] Learn a vBPE vocabulary from VQ codes: vq_codes/ (or .npy files) -> vbpe/ (vbpe.json and a
manifest), or vbpe.json alone.

--data_path takes folders written by `beingvl encode-images`, .npy files, or folders of .npy files,
of [N, H, W] or [N, H * W] uint16, int32 or int64; sizes may differ between files. The learnt
vocabulary is a pure function of codes and options.

`--import_pkl vbpe.pkl` converts a published pickled vocabulary instead of learning one.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data_path", nargs="+", type=Path, help="VQ codes to learn from")
    parser.add_argument(
        "--output_path",
        type=Path,
        required=True,
        help="folder to write vbpe.json in, or FILE.json without a manifest",
    )
    parser.add_argument("--num_merges", type=int, default=8192, help="merges to learn")
    parser.add_argument(
        "--alpha",
        type=float,
        default=0.3,
        help="weight of spatial consistency against frequency; 0: frequency alone",
    )
    parser.add_argument(
        "--sigma",
        type=float,
        default=1.0,
        help="how far apart, in cells, offsets of a pair may lie to count as alike",
    )
    parser.add_argument(
        "--min_count", type=int, default=2, help="pairs that occur less often are never merged"
    )
    parser.add_argument(
        "--init_size",
        type=int,
        help="number of VQ codes (default: as the vq_codes folder says, else largest code + 1)",
    )
    parser.add_argument(
        "--vocab_pad",
        type=int,
        default=0,
        help="what the files add to each code: they hold code + vocab_pad",
    )
    parser.add_argument(
        "--vocab_end",
        type=int,
        help="one past the largest id in the files, i.e. vocab_pad + init_size (checked)",
    )
    parser.add_argument(
        "--grid",
        nargs=2,
        type=int,
        metavar=("H", "W"),
        help="grid of [N, H * W] files (default: square)",
    )
    parser.add_argument("--max_images", type=int, help="learn from a sample of this many images")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument(
        "--validate_data",
        action="store_true",
        help="print what the files hold before learning; checks run always",
    )
    parser.add_argument(
        "--save_intermediate",
        nargs="?",
        type=int,
        const=1000,
        metavar="MERGES",
        help="save every MERGES merges (1000 if no number is given) next to the output; the "
        "same command continues from there",
    )
    parser.add_argument(
        "--import_pkl",
        type=Path,
        help="published vocabulary (pickle) to convert; nothing is learnt",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a finished output of other inputs"
    )


def run(args: argparse.Namespace) -> None:
    from beingvl.vbpe.train_vbpe import run as step

    step(args)
