"""The mixture of a stage's JSON against what its shards hold: one decision for training, preflight,
`plan` and `report data`.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import replace

from beingvl.artefact.manifest import Manifest
from beingvl.errors import InputError
from beingvl.stage.stage_config import StageConfig

NO_CATEGORY = "default"  # the source of rows that name none


def fit_mixture(config: StageConfig, shards: Manifest) -> tuple[StageConfig, str]:
    """The stage as it trains on these shards, and a line for the user where that is not as its
    JSON says: when no row names its source, and the mixture names one that is not there, it
    trains on all of them in full.

    Raises InputError that says which mixture would do, when rows do name theirs.
    """
    weights, sources = config.beingvl.mixture, shards.details["sources"]
    missing = [name for name in weights if name not in sources]
    if not missing:
        return config, ""
    in_full = {name: entry[config.beingvl.mixture_by] for name, entry in sources.items()}
    if not shards.details.get("names_categories", list(sources) != [NO_CATEGORY]):
        block = replace(config.beingvl, mixture=in_full)
        return replace(config, beingvl=block), (
            f"no row names a category: the stage trains on all {shards.counts['samples']:,} "
            "samples in full, without beingvl.mixture"
        )
    left = {name: weight for name, weight in weights.items() if name in sources}
    fitting = json.dumps(left if any(left.values()) else in_full, ensure_ascii=False)
    raise InputError(
        f"the mixture names the source {missing[0]!r}, the shards hold {list(sources)}; correct "
        f"beingvl.mixture, or add --set {shlex.quote(f'beingvl.mixture={fitting}')}"
    )
