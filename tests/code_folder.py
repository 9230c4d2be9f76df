"""A folder of codes, as `beingvl encode-images` writes it, of given codes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from beingvl.images import vq_codes


def write_codes(
    folder: Path,
    codes: np.ndarray,
    num_codes: int,
    lineage: Mapping[str, str],
    keys: Sequence[str] | None = None,
) -> Path:
    """`codes` `[N, H, W]`; sorted `keys`, by default 0.png, 1.png, …"""
    keys = keys or [f"{number}.png" for number in range(len(codes))]
    folder.mkdir(exist_ok=True)
    np.save(folder / vq_codes.CODES_FILE, codes.astype("<u2"))
    hashes = b"".join(map(vq_codes.code_hash, keys, codes))
    np.save(folder / vq_codes.CODE_HASHES_FILE, np.frombuffer(hashes, "<u8"))
    lines = "".join(map(vq_codes.key_line, keys))
    (folder / vq_codes.KEYS_FILE).write_text(lines, encoding="utf-8")
    (folder / vq_codes.REJECTED_FILE).write_text("")
    details = {"num_codes": num_codes, "grid": list(codes.shape[1:])}
    vq_codes.finish_codes(folder, {"images": len(codes)}, lineage, details, {})
    return folder
