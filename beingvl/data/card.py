"""The shards' card: README.md, made from their manifest alone."""

from __future__ import annotations

from beingvl.artefact.card import table
from beingvl.artefact.manifest import Manifest

_FRONT = """\
---
task_categories:
- image-text-to-text
tags:
- being-vl
- image-tokens
# license: yours to choose; the licences of the images and of the texts bind you
---

# Token shards of Being-VL

Samples of images and text as ids of one vocabulary: `beingvl train --data` reads this folder,
`beingvl report data` shows what it holds.

"""
_SIZES = {"num_text": "of text", "num_vq": "VQ codes", "num_merges": "merges"}


def data_card(manifest: Manifest) -> str:
    counts, details, lineage = manifest.counts, manifest.details, manifest.lineage
    layout = details["layout"]
    made_with = ("variant", "template", "image_positions")
    sizes = [f"{layout[name]:,} {what}" for name, what in _SIZES.items()]
    rows = [
        *((name.replace("_", " "), f"{value:,}") for name, value in counts.items()),
        *((name.replace("_", " "), details[name]) for name in made_with if details.get(name)),
        ("ids", ", ".join(sizes)),
        *((f"made with {name}", value) for name, value in lineage.items()),
        ("this folder", manifest.content_hash),
        ("written with", f"beingvl {manifest.beingvl_version}"),
    ]
    sources = [
        (name, f"{samples:,}", f"{tokens:,}", f"{tokens / counts['tokens']:.1%}")
        for name, one in details["sources"].items()
        for samples, tokens in [(one["samples"], one["tokens"])]
    ]
    head = ("source", "samples", "tokens", "share of tokens")
    return _FRONT + table(("", ""), rows) + "## Sources\n\n" + table(head, sources)
