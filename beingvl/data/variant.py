"""Which image tokens shards hold and a model was trained on: merged ones, or plain codes.

Manifests say it in `details["variant"]` since they know it; without a word nothing is known.
"""

from __future__ import annotations

from beingvl.artefact.manifest import Manifest
from beingvl.vocab import VocabLayout

MERGED, RAW = "vbpe", "raw"


def variant_up_to(largest_id: int, layout: VocabLayout) -> str | None:
    """Of sequences with this largest token id; None of text alone."""
    if largest_id < layout.first_image_id:
        return None
    return MERGED if largest_id >= layout.first_vbpe_id else RAW


def variant_of(manifest: Manifest, layout: VocabLayout) -> str | None:
    """Of a model; one without merges knows plain codes alone."""
    return manifest.details.get("variant") if layout.num_merges else RAW
