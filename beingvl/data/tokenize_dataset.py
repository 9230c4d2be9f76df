"""[3] LLaVA JSON + images (or vq_codes/) + vbpe.json -> token rows in JSONL.

Steps, in order:
  1. image codes      from --vq_codes, or encoded now with the model folder's VQ-GAN into OUTPUT_DIR/vq_codes
  2. parse            every row's conversation; a malformed one goes to rejected.jsonl with its index and reason
  3. write            NAME_base.jsonl (VQ codes) and NAME_vbpe.jsonl (merged), one row a sample
  4. manifest.json    last

A row: id, image, category, conversations, token_0, token_image (codes), token_image_new (merged), token_1, and target_spans
(start, end) in token_0 + image + token_1.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from beingvl.data.conversation import TextEncoder, TokenizedSample
    from beingvl.tokenizer.vbpe import VisualBPE
    from beingvl.tokenizer.vbpe_legacy import LegacyVisualBPE
    from beingvl.tokenizer.vq_codes import CodeFolder
    from beingvl.vocab import VocabLayout

DEFAULT_CATEGORY = {"pt": "foundation", "sft": "instruction"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mode", choices=["pt", "sft"], default="sft", help="category of rows that name none: pt foundation, sft instruction"
    )
    parser.add_argument("--json_path", type=Path, required=True, help="LLaVA-format JSON array or JSONL")
    parser.add_argument("--image_path", type=Path, help="folder that the rows' image paths start from")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--model_path", type=Path, required=True, help="Being-VL model folder: tokenizer, vocabulary layout, VQ-GAN"
    )
    parser.add_argument("--vbpe_path", type=Path, help="vbpe.json; without it only NAME_base.jsonl is written")
    parser.add_argument("--vq_codes", type=Path, help="folder of encode-images; without it the images are encoded now")
    parser.add_argument("--dataset_name", default="data", help="NAME in the output files' names")
    parser.add_argument("--template", choices=["default", "being-vl-0.5"], default="default", help="chat template")
    parser.add_argument("--max_length", type=int, help="reject samples of more tokens than this")
    parser.add_argument("--max_rejected", type=float, default=0.01, help="fail when more than this share of rows is rejected")
    parser.add_argument("--batch_size", type=int, default=16, help="images a batch, when images are encoded now")
    parser.add_argument("--num_workers", type=int, default=1, help="processes that decode images, when images are encoded now")
    parser.add_argument(
        "--torch_dtype", default="float32", choices=["float32", "bfloat16"], help="of the VQ-GAN, when images are encoded now"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a finished output of other inputs")


def run(args: argparse.Namespace) -> None:
    from beingvl.data.conversation import TextEncoder
    from beingvl.errors import InputError
    from beingvl.manifest import already_made, hash_file, join_lineages, write_manifest
    from beingvl.vocab import VocabLayout

    layout = VocabLayout.load(args.model_path)
    rows = read_rows(args.json_path)
    codes = _open_codes(args, rows)
    vbpe = _open_vbpe(args.vbpe_path, layout) if args.vbpe_path else None
    lineage = join_lineages(_lineages(args, codes, vbpe))
    request = {
        "json": hash_file(args.json_path),
        "codes": codes.manifest.content_hash if codes else None,
        "lineage": lineage,
        **{name: getattr(args, name) for name in ("mode", "dataset_name", "template", "max_length")},
    }
    if already_made(args.output_dir, "jsonl", request, args.overwrite):
        return
    tokenizer = RowTokenizer(
        TextEncoder(args.model_path, layout), layout, codes, vbpe, args.template, DEFAULT_CATEGORY[args.mode]
    )
    counts = _write_rows(rows, tokenizer, args.output_dir, args.dataset_name, args.max_length)
    if counts["rejected"] > args.max_rejected * len(rows):
        listing = args.output_dir / "rejected.jsonl"
        found = f"{counts['rejected']} of {len(rows)} rows of {args.json_path} were rejected, more than {args.max_rejected:.1%}"
        raise InputError(f"{found} (--max_rejected); the first: {listing.read_text().splitlines()[0]}; all are in {listing}")
    write_manifest(args.output_dir, "jsonl", counts, lineage, {"layout": layout.to_dict(), "request": request})
    print(f"{args.output_dir}: {counts['rows']} rows, {counts['rejected']} rejected")


def read_rows(path: Path) -> list[dict]:
    """Rows of a LLaVA JSON array or a JSONL file. Raises InputError that names the damaged line."""
    from beingvl.errors import InputError

    text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{path} is not valid JSON ({error})") from error
    else:
        rows = []
        for number, line in enumerate(text.rstrip("\n").split("\n"), 1):  # splitlines would also cut at U+2028 inside a text
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise InputError(f"{path}, line {number}: not valid JSON ({error})") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: expected a non-empty list of objects in LLaVA format")
    return rows


def image_keys(row: dict) -> list[str]:
    """The images of a row: `image` is a path, a list of paths, or absent."""
    image = row.get("image") or []
    return [image] if isinstance(image, str) else list(image)


class RowTokenizer:
    """One LLaVA row to one JSONL row per variant: `base` with VQ codes, `vbpe` with merged ids."""

    def __init__(
        self,
        encoder: TextEncoder,
        layout: VocabLayout,
        codes: CodeFolder | None,
        vbpe: VisualBPE | LegacyVisualBPE | None,
        template: str,
        default_category: str,
    ) -> None:
        self._encoder = encoder
        self._layout = layout
        self._codes = codes
        self._vbpe = vbpe
        self._template = template
        self._default_category = default_category

    @property
    def variants(self) -> list[str]:
        return ["base", "vbpe"] if self._vbpe else ["base"]

    def __call__(self, row: dict) -> dict[str, dict[str, Any]]:
        """Variant -> JSONL row. Raises InputError that says what is malformed."""
        from beingvl.data.conversation import build_sequence, parse_conversation

        turns = parse_conversation(row.get("conversations"))
        grids = [self._codes.codes[self._codes.row(key)] for key in image_keys(row)] if self._codes else []
        raw_images = [self._layout.image_to_token_ids(grid.ravel()) for grid in grids]
        raw = build_sequence(turns, raw_images, self._encoder, self._layout, self._template)
        out = {"base": self._jsonl_row(row, raw, raw.image)}
        if self._vbpe:
            merged_images = [self._layout.image_to_token_ids(self._vbpe.encode(grid)) for grid in grids]
            merged = build_sequence(turns, merged_images, self._encoder, self._layout, self._template)
            out["vbpe"] = self._jsonl_row(row, merged, raw.image, merged.image)
        return out

    def _jsonl_row(
        self, row: dict, sample: TokenizedSample, token_image: list[int], token_image_new: list[int] | None = None
    ) -> dict[str, Any]:
        return {
            "id": str(row.get("id", "")),
            "image": row.get("image"),
            "category": row.get("category") or self._default_category,
            "conversations": row["conversations"],
            "token_0": sample.token_0,
            "token_image": token_image,
            **({} if token_image_new is None else {"token_image_new": token_image_new}),
            "token_1": sample.token_1,
            "target_spans": sample.target_spans,
        }


def _open_codes(args: argparse.Namespace, rows: list[dict]) -> CodeFolder | None:
    """The image codes the rows need: given, or made now by step 1 with the model folder's own VQ-GAN."""
    from beingvl.cli import main
    from beingvl.errors import InputError
    from beingvl.tokenizer.vq_codes import CodeFolder

    if not any(image_keys(row) for row in rows):
        return None
    if args.vq_codes:
        return CodeFolder(args.vq_codes)
    if not args.image_path:
        raise InputError(f"{args.json_path} names images: give --vq_codes, or --image_path to encode them now")
    folder = args.output_dir.with_name(args.output_dir.name + "_vq_codes")
    command = ["encode-images", f"--image_path={args.image_path}", f"--json_path={args.json_path}", f"--output_path={folder}"]
    command += [f"--vq_path={args.model_path / 'vqgan'}", f"--batch_size={args.batch_size}", f"--num_workers={args.num_workers}"]
    if main(command):
        raise InputError(f"encoding the images of {args.json_path} failed, see above")
    return CodeFolder(folder)


def _open_vbpe(path: Path, layout: VocabLayout) -> VisualBPE | LegacyVisualBPE:
    from beingvl.errors import InputError
    from beingvl.tokenizer.vbpe import VisualBPE

    vbpe = VisualBPE.load(path)
    if vbpe.num_codes != layout.num_vq or vbpe.num_merges > layout.num_merges:
        found = f"{path} has {vbpe.num_codes} codes and {vbpe.num_merges} merges"
        raise InputError(f"{found}, the model's vocabulary has room for {layout.num_vq} and {layout.num_merges}")
    return vbpe


def _lineages(
    args: argparse.Namespace, codes: CodeFolder | None, vbpe: VisualBPE | LegacyVisualBPE | None
) -> dict[str, dict[str, str]]:
    from beingvl.manifest import read_manifest

    lineages = {str(args.model_path): read_manifest(args.model_path, "model").lineage}
    if codes:
        lineages[str(codes.path)] = codes.manifest.lineage
    if vbpe:
        lineages[str(args.vbpe_path)] = {**vbpe.lineage, "vbpe": vbpe.fingerprint()}
    return lineages


def _write_rows(rows: list[dict], tokenizer: RowTokenizer, folder: Path, name: str, max_length: int | None) -> dict[str, int]:
    """Write the JSONL files and rejected.jsonl; they get their final names when all rows are written."""
    from contextlib import ExitStack

    from tqdm import tqdm

    from beingvl.errors import InputError
    from beingvl.manifest import start_folder

    start_folder(folder)
    paths = {variant: folder / f"{name}_{variant}.jsonl" for variant in tokenizer.variants}
    paths["rejected"] = folder / "rejected.jsonl"
    counts = {"rows": 0, "rejected": 0, "longest_sample_tokens": 0}
    with ExitStack() as stack:
        files = {key: stack.enter_context(open(f"{path}.tmp", "w", encoding="utf-8")) for key, path in paths.items()}
        for index, row in enumerate(tqdm(rows, desc="tokenize", unit="row", disable=None)):
            try:
                variants = tokenizer(row)
                length = max(map(_num_tokens, variants.values()))
                if max_length and length > max_length:
                    raise InputError(f"the sample has {length} tokens, --max_length is {max_length}")
            except InputError as error:
                counts["rejected"] += 1
                _write_line(files["rejected"], {"index": index, "id": row.get("id"), "reason": str(error)})
                continue
            counts["rows"] += 1
            counts["longest_sample_tokens"] = max(counts["longest_sample_tokens"], length)
            for variant, out in variants.items():
                _write_line(files[variant], out)
    for path in paths.values():
        Path(f"{path}.tmp").replace(path)
    return counts


def _num_tokens(row: dict) -> int:
    return len(row["token_0"]) + len(row.get("token_image_new", row["token_image"])) + len(row["token_1"])


def _write_line(file: IO[str], value: dict) -> None:
    file.write(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    import sys

    from beingvl.cli import main

    sys.exit(main(["tokenize", *sys.argv[1:]]))
