"""Checks a stage's mixture against the sources in its shards, the same way for training, preflight,
`plan` and `report data`.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import replace

from beingvl.artefact.manifest import Manifest
from beingvl.errors import InputError
from beingvl.stage.stage_config import StageConfig

NO_CATEGORY = "default"  # the source of dataset rows that name none


def fit_mixture(config: StageConfig, shards: Manifest) -> tuple[StageConfig, str]:
    """The stage as it trains on these shards, and a note for the user if that differs from its
    JSON. If no dataset row names a category and the mixture names missing sources, the stage trains
    on all samples in full.

    If dataset rows do name categories, raises InputError with a mixture that fits.
    """
    weights, sources = config.beingvl.mixture, shards.details["sources"]
    missing = [name for name in weights if name not in sources]
    if not missing:
        return config, ""
    in_full = {name: entry[config.beingvl.mixture_by] for name, entry in sources.items()}
    if not shards.details.get("names_categories", list(sources) != [NO_CATEGORY]):
        block = replace(config.beingvl, mixture=in_full)
        return replace(config, beingvl=block), (
            "no dataset row names a category: the stage trains on all "
            f"{shards.counts['samples']:,} samples in full, without beingvl.mixture"
        )
    left = {name: weight for name, weight in weights.items() if name in sources}
    fitting = json.dumps(left if any(left.values()) else in_full, ensure_ascii=False)
    raise InputError(
        f"the mixture names the source {missing[0]!r}, the shards hold {list(sources)}; correct "
        f"beingvl.mixture, or add --set {shlex.quote(f'beingvl.mixture={fitting}')}"
    )
