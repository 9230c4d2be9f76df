"""Extract the VQ-GAN of a Chameleon or Janus checkpoint into a VQ-GAN folder.

    python scripts/extract_vqgan.py CHECKPOINT VQGAN

CHECKPOINT is a folder in transformers' format (facebook/chameleon-7b,
deepseek-community/Janus-Pro-1B). Only the VQ-GAN's own tensors are read.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from safetensors.torch import save
from transformers import AutoConfig

from beingvl.artefact.hashes import hash_bytes
from beingvl.artefact.owner import making_alone
from beingvl.errors import InputError
from beingvl.images.vqgan import PREPROCESSOR_FILE, VQGAN, make_processor
from beingvl.model.weight_files import WeightFolder

PREFIX = "vqmodel."


def extract(checkpoint: Path, output: Path, overwrite: bool = False) -> VQGAN:
    """Write the folder `output`. Raises InputError for a checkpoint without a VQ-GAN, and for an
    output with other files.
    """
    if not (checkpoint / "config.json").is_file():
        found = "has no config.json" if checkpoint.is_dir() else "is not a folder"
        raise InputError(f"{checkpoint} {found}; expected a downloaded checkpoint")
    try:
        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    except ValueError as error:  # of a class that only the checkpoint's own code has
        raise InputError(f"{checkpoint}/config.json cannot be read: {error}") from error
    if not hasattr(config, "vq_config"):
        expected = "a Chameleon or Janus checkpoint in transformers' format"
        raise InputError(f"{checkpoint} is of model_type {config.model_type}, expected {expected}")
    fields = config.vq_config.to_dict()
    stored = WeightFolder(checkpoint, lambda name: PREFIX in name)
    weights = {name.partition(PREFIX)[2]: stored[name].float() for name in stored}
    with tempfile.TemporaryDirectory() as folder:
        preprocessing = checkpoint / PREPROCESSOR_FILE
        if fields["model_type"] == "janus_vqgan":  # the checkpoint's own is for its vision tower
            factor = 2 ** (len(fields["channel_multiplier"]) - 1)
            make_processor(fields["num_patches"] * factor).save_pretrained(folder)
            preprocessing = Path(folder) / PREPROCESSOR_FILE
        vqgan = VQGAN.build(fields, weights, preprocessing, checkpoint)
    request = {"vqgan": vqgan.fingerprint(), "weights": hash_bytes(save(weights))}
    with making_alone(output, "vqgan", request, overwrite) as is_new:
        if is_new:
            vqgan.save(output, details={"request": request})
    return vqgan


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("checkpoint", type=Path, help="folder of the downloaded checkpoint")
    parser.add_argument("output", type=Path, help="VQ-GAN folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished output folder")
    args = parser.parse_args(argv)
    try:
        vqgan = extract(args.checkpoint, args.output, args.overwrite)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.output}: {vqgan.num_codes} codes, {vqgan.image_size} pixels, grid {vqgan.grid}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
