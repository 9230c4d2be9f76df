"""Real images for the quickstart: scikit-learn's handwritten digits as PNG files, LLaVA-format
JSON and text lines.

    load_digits       1797 scans of 8 x 8 pixels, in the scikit-learn wheel: nothing is downloaded
    split_by_image    train / validation / test: no scan is in two parts, every digit has the same
                      share of each
    render            scales to `image_size` pixels; training images are also shifted, rotated and
                      rescaled
    training_rows     true captions and questions about the digit in the image, one dataset row per
                      image and category
    question_rows     one question per dataset row, for scoring
    text_lines        the same language without images, for the text tokenizer and the text model

    OUTPUT_DIR/  images/{train,validation,test}/*.png   train.json  validation.json  test.json
        texts.txt   manifest.json

The digits are from the UCI optical recognition test set (Alpaydin and Kaynak, 1998).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from beingvl.artefact.files import to_json, write_atomically
from beingvl.artefact.manifest import write_manifest
from beingvl.artefact.owner import making_alone
from beingvl.artefact.progress import progress
from beingvl.errors import InputError

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NUM_TRAIN, NUM_VALIDATION = 1200, 200

WHICH, EVEN, GREATER = "Which digit is this?", "Is it even?", "Is it greater than four?"
CATEGORY_OF_QUESTION = {WHICH: "perception", EVEN: "reasoning", GREATER: "reasoning"}
INSTRUCTIONS = {
    WHICH: (WHICH, "Answer with one word: which digit is this?", "Name the digit."),
    EVEN: (EVEN, "Answer with yes or no: is it even?", "Say whether it is even."),
    GREATER: (
        GREATER,
        "Answer with yes or no: is it greater than four?",
        "Say whether it is greater than four.",
    ),
}
CAPTIONS = (
    ("Describe the image.", "A scan of the handwritten digit {word}."),
    ("What does the image show?", "The image shows the handwritten digit {word}."),
    ("Write a caption.", "The digit {word}, written by hand."),
)


def answer(question: str, digit: int) -> str:
    """The true answer to one of the three questions, one short word."""
    if question == WHICH:
        return WORDS[digit]
    return "yes" if (digit % 2 == 0 if question == EVEN else digit > 4) else "no"


# ---- images ----


def split_by_image(digits: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Indices of each part's scans; each digit has the same share of every part, up to rounding."""
    parts: dict[str, list[np.ndarray]] = {"train": [], "validation": [], "test": []}
    for digit in range(10):
        indices = rng.permutation(np.flatnonzero(digits == digit))
        borders = np.round(
            len(indices) * np.array([NUM_TRAIN, NUM_TRAIN + NUM_VALIDATION]) / len(digits)
        ).astype(int)
        for name, part in zip(parts, np.split(indices, borders), strict=True):
            parts[name].append(part)
    return {name: np.sort(np.concatenate(part)) for name, part in parts.items()}


def render(
    scan: np.ndarray,
    image_size: int,
    degrees: float = 0.0,
    scale: float = 1.0,
    shift: tuple[float, float] = (0.0, 0.0),
) -> np.ndarray:
    """A scan `[8, 8]` with values 0 … 16 as an image `[image_size, image_size]` uint8; `shift` is
    in scan pixels.

    One bilinear affine map, so that augmented images are as sharp as the others; black around the
    scan.
    """
    from scipy.ndimage import affine_transform

    angle = np.deg2rad(degrees)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    to_scan = rotation * (len(scan) / image_size / scale)
    centre_of_image = (image_size - 1) / 2
    offset = (len(scan) - 1) / 2 - to_scan @ np.full(2, centre_of_image) - np.asarray(shift)
    image = affine_transform(
        scan, to_scan, offset, output_shape=(image_size, image_size), order=1, mode="grid-constant"
    )
    return np.round(image * (255 / 16)).clip(0, 255).astype(np.uint8)


def augmented(scan: np.ndarray, image_size: int, rng: np.random.Generator) -> np.ndarray:
    """A variant that a human reads as the same digit: rotated by up to 10 degrees, scaled by up to
    10 %, shifted by up to half a scan pixel.
    """
    shift = tuple(rng.uniform(-0.5, 0.5, size=2))
    return render(scan, image_size, rng.uniform(-10, 10), rng.uniform(0.9, 1.1), shift)


def write_images(
    scans: np.ndarray, folder: Path, parts: dict[str, np.ndarray], args: argparse.Namespace
) -> dict[str, list]:
    """Write all PNG files; returns part -> list of (image key, index of the scan)."""
    from PIL import Image

    rng = np.random.default_rng([args.seed, 1])
    written: dict[str, list] = {}
    for part, indices in parts.items():
        (folder / "images" / part).mkdir(parents=True, exist_ok=True)
        written[part] = []
        for index in progress(indices, name=f"{part} images", unit="scan"):
            variants = [render(scans[index], args.image_size)]
            if part == "train":
                variants += [
                    augmented(scans[index], args.image_size, rng) for _ in range(args.augmentations)
                ]
            for number, pixels in enumerate(variants):
                key = f"{part}/{index:04d}-{number}.png"
                Image.fromarray(pixels).convert("RGB").save(folder / "images" / key)
                written[part].append((key, index))
    return written


# ---- conversations ----


def conversation(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    """Turns in LLaVA format; the image placeholder is in the first question."""
    out = []
    for number, (question, reply) in enumerate(turns):
        out.append({"from": "human", "value": f"<image>\n{question}" if number == 0 else question})
        out.append({"from": "gpt", "value": reply})
    return out


def training_rows(key: str, digit: int, rng: np.random.Generator) -> list[dict]:
    """One dataset row per category for one image: a caption, the name, a yes-or-no question, a
    conversation of three turns.

    The conversation names the digit first, so its yes-or-no turns can build on that. A reasoning
    row has only the image.
    """
    request, caption = CAPTIONS[rng.integers(len(CAPTIONS))]
    yes_or_no = [(EVEN, GREATER)[n] for n in rng.permutation(2)]
    turns_of_category = {
        "foundation": [(request, caption.format(word=WORDS[digit]))],
        "perception": [(WHICH, WORDS[digit])],
        "reasoning": [(yes_or_no[0], answer(yes_or_no[0], digit))],
        "instruction": [
            (INSTRUCTIONS[q][rng.integers(len(INSTRUCTIONS[q]))], answer(q, digit))
            for q in (WHICH, *yes_or_no)
        ],
    }
    return [
        {
            "id": f"{Path(key).stem}-{category}",
            "image": key,
            "category": category,
            "conversations": conversation(turns),
        }
        for category, turns in turns_of_category.items()
    ]


def question_rows(key: str, digit: int) -> list[dict]:
    """One dataset row per question for one image."""
    return [
        {
            "id": f"{Path(key).stem}-{number}",
            "image": key,
            "category": category,
            "conversations": conversation([(question, answer(question, digit))]),
        }
        for number, (question, category) in enumerate(CATEGORY_OF_QUESTION.items())
    ]


def text_lines() -> list[str]:
    """All sentence templates with all digit words. They define words, but never describe images."""
    lines = []
    for digit, word in enumerate(WORDS):
        lines += [f"{request} {caption.format(word=word)}" for request, caption in CAPTIONS]
        for question, wordings in INSTRUCTIONS.items():
            lines += [
                f"The digit is {word}. {wording} {answer(question, digit)}" for wording in wordings
            ]
        name = word.capitalize()
        lines.append(f"{name} is {'even' if digit % 2 == 0 else 'odd'}.")
        lines.append(f"Is {word} even? {answer(EVEN, digit)}")
        lines.append(f"Is {word} greater than four? {answer(GREATER, digit)}")
        for other, other_word in enumerate(WORDS):
            if other != digit:
                lines.append(
                    f"{name} is {'greater' if digit > other else 'less'} than {other_word}."
                )
        if digit < 9:
            lines.append(f"After {word} comes {WORDS[digit + 1]}.")
    return lines


# ---- command ----


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("data/digits"),
        help="folder to write (default: data/digits)",
    )
    parser.add_argument("--image_size", type=int, default=16, help="pixels per side (default: 16)")
    parser.add_argument(
        "--augmentations",
        type=int,
        default=4,
        help="augmented copies of each training image (default: 4)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of the split, the augmentation and the wording (default: 0)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a folder that was made with other arguments",
    )
    args = parser.parse_args(argv)
    if args.image_size < 8:
        raise InputError(
            f"--image_size is {args.image_size}, expected at least 8, the size of the scans"
        )
    if args.augmentations < 0 or args.seed < 0:
        raise InputError(
            f"--augmentations {args.augmentations} --seed {args.seed}: expected numbers from 0"
        )
    return args


def make_dataset(args: argparse.Namespace) -> None:
    request = {
        "image_size": args.image_size,
        "augmentations": args.augmentations,
        "seed": args.seed,
    }
    with making_alone(args.output_dir, "dataset", request, args.overwrite) as is_new:
        if is_new:
            write_dataset(args, request)


def write_dataset(args: argparse.Namespace, request: dict[str, int]) -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    folder = args.output_dir
    parts = split_by_image(bunch.target, np.random.default_rng([args.seed, 0]))
    for part in parts:
        for stale in (folder / "images" / part).glob("????-*.png"):  # of a run that was killed
            stale.unlink()
    images = write_images(bunch.images, folder, parts, args)
    rng = np.random.default_rng([args.seed, 2])
    counts: dict[str, int] = {}
    for part, keys in images.items():
        rows: list[dict] = []
        for key, index in keys:
            digit = int(bunch.target[index])
            rows += training_rows(key, digit, rng) if part == "train" else question_rows(key, digit)
        write_atomically(folder / f"{part}.json", to_json(rows))
        counts |= {f"{part}_images": len(keys), f"{part}_rows": len(rows)}
    lines = text_lines()
    write_atomically(folder / "texts.txt", "\n".join(lines) + "\n")
    counts["text_lines"] = len(lines)
    names = {"texts.txt", *(f"{part}.json" for part in parts)}
    names |= {f"images/{key}" for keys in images.values() for key, _ in keys}
    details = {"request": request}
    write_manifest(folder, "dataset", counts, {}, details, belongs=names.__contains__)
    print(
        f"{folder}: "
        + ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())
    )


def main(argv: list[str] | None = None) -> int:
    try:
        make_dataset(parse_arguments(argv))
    except (InputError, OSError) as error:
        print(f"make_digits_dataset: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
