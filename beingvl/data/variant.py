"""Which image tokens are in shards, or a model was trained on: merged tokens or plain codes.

Manifests record it in `details["variant"]`; older manifests do not have it, so it is unknown.
"""

from __future__ import annotations

from beingvl.artefact.manifest import Manifest
from beingvl.vocab import VocabLayout

MERGED, RAW = "vbpe", "raw"


def variant_up_to(largest_id: int, layout: VocabLayout) -> str | None:
    """The variant of sequences with this largest token id; None if they are text only."""
    if largest_id < layout.first_image_id:
        return None
    return MERGED if largest_id >= layout.first_vbpe_id else RAW


def variant_of(manifest: Manifest, layout: VocabLayout) -> str | None:
    """A model's variant; a model without merges knows only plain codes."""
    return manifest.details.get("variant") if layout.num_merges else RAW
