"""A model folder's card: README.md, made from manifests alone, so equal models have equal cards.

A model folder's manifest records what the model, and before it its start model (`history`), was
made with; so the last manifest covers all stages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from beingvl.artefact.card import table
from beingvl.artefact.manifest import Manifest
from beingvl.json_file import read_object
from beingvl.vbpe.vbpe_file import VBPE_FILE
from beingvl.vocab import VocabLayout

_FRONT = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
tags:
- being-vl
- image-tokens
# license: yours to choose; the licences of the base, of the VQ-GAN and of the data bind you
# base_model: the name that the base has on the Hub
---

# Being-VL model after {stages}

One causal language model for text and images: an image is a grid of VQ-GAN codes{merged}, which are
ids of its vocabulary like those of text.

"""
_LOAD = """\
## How to load

```python
from beingvl import BeingVL

model = BeingVL.from_pretrained("."{vbpe})  # this folder, or its name on the Hub
print(model("What is in the picture?", "picture.png"))
```

The weights are stock: `transformers.AutoModelForCausalLM` loads them, and
`AutoProcessor` makes its inputs once `import beingvl` has run.
"""
_SETTINGS = {
    "optimizer steps": "step",
    "epochs, at most": "epochs",
    "sequences per step": "train_batch_size",
    "tokens per sequence": "sequence_length",
    "schedule": "schedule",
    "warm-up, share of all steps": "warmup_ratio",
    "gradient clipping": "gradient_clipping",
    "loss on": "loss_on",
    "seed": "seed",
}


def history_of(manifest: Manifest) -> list[dict[str, Any]]:
    """What a model was made with, preceded by the same for the models that it was made from."""
    own = {name: value for name, value in manifest.details.items() if name != "history"}
    return [*manifest.details.get("history", []), {"hash": manifest.content_hash, **own}]


def data_facts(shards: Manifest) -> dict[str, Any]:
    """What a card says about a stage's data."""
    return {"counts": shards.counts, "sources": shards.details.get("sources", {})}


def model_card(folder: Path, manifest: Manifest, scores: Sequence[Mapping[str, Any]] = ()) -> str:
    """The card's text; `scores` are the scores.json of this model's evaluations."""
    models = history_of(manifest)
    stages = [model for model in models if model.get("identity")]
    count = f"{len(stages) or 'no'} training {'stage' if len(stages) == 1 else 'stages'}"
    layout = VocabLayout.load(folder)
    merged = ", merged by vBPE" if layout.num_merges else ""
    vbpe = "" if (folder / VBPE_FILE).is_file() or not layout.num_merges else ', "vbpe.json"'
    parts = [_FRONT.format(stages=count, merged=merged), _facts(folder, layout, manifest, models)]
    parts += [_stage(number, model) for number, model in enumerate(stages, 1)]
    parts += [_scores(scores), _LOAD.format(vbpe=vbpe)]
    return "".join(parts)


def _facts(
    folder: Path, layout: VocabLayout, manifest: Manifest, models: Sequence[Mapping[str, Any]]
) -> str:
    config, lineage, details = read_object(folder / "config.json"), manifest.lineage, models[-1]
    width, depth = config.get("hidden_size"), config.get("num_hidden_layers")
    request = models[0].get("request", {})
    versions = {"beingvl": manifest.beingvl_version, **details.get("versions", {})}
    rows = [
        ("base", f"{config.get('model_type')}, {depth} layers of width {width}"),
        ("hash of the base", request.get("llama")),
        ("new rows", f"`{request['init']}`, seed {request['seed']}" if request else None),
        ("text ids", f"{layout.num_text:,}"),
        ("VQ-GAN", f"{layout.num_vq:,} codes, {lineage.get('vqgan', 'not inside')}"),
        ("vBPE", f"{layout.num_merges:,} merges, {lineage.get('vbpe', 'not inside')}"),
        ("vocabulary", f"{layout.size:,} ids, {lineage.get('vocab')}"),
        ("images in training", details.get("variant")),
        ("chat template", details.get("template")),
        ("image positions", details.get("image_positions")),
        ("this folder", manifest.content_hash),
        ("written with", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]
    return "## What it is\n\n" + table(("", ""), [row for row in rows if row[1]])


def _stage(number: int, model: Mapping[str, Any]) -> str:
    said: dict[str, Any] = {"step": model.get("step"), **model["identity"]}
    optimizer = said.get("optimizer") or {"type": None, "params": {}}
    rules = [rule for rule in said.get("trainable", []) if rule["train"]]
    is_bf16 = (said.get("bf16") or {}).get("enabled")
    rows = [
        ("trained", ", ".join(f"`{rule['match']}`" for rule in rules)),
        ("optimizer", optimizer["type"]),
        ("learning rate", optimizer["params"].get("lr")),
        *((name, said.get(key)) for name, key in _SETTINGS.items()),
        ("weights while training", "bfloat16" if is_bf16 else "float32"),
        ("start model", said.get("start_model")),
        ("shards", said.get("shards")),
    ]
    settings = table(("setting", "value"), [row for row in rows if row[1] is not None])
    return f"## Stage {number}\n\n{settings}{_data(said, model.get('data'))}"


def _data(said: Mapping[str, Any], data: Mapping[str, Any] | None) -> str:
    shares, sources = dict(said.get("mixture") or []), (data or {}).get("sources", {})
    rows = [
        (name, f"{shares[name]:.1%}" if name in shares else "", *_amounts(sources.get(name, {})))
        for name in sorted({*shares, *sources})
    ]
    if data:
        rows.append(("all", "", *_amounts(data["counts"])))
    head = ("source", f"share of {said.get('mixture_by', 'samples')}", "samples", "tokens")
    return table(head, rows) if rows else ""


def _amounts(counts: Mapping[str, int]) -> tuple[str, str]:
    samples, tokens = (counts.get(name) for name in ("samples", "tokens"))
    return f"{samples:,}" if samples else "", f"{tokens:,}" if tokens else ""


def _scores(scores: Sequence[Mapping[str, Any]]) -> str:
    if not scores:
        return ""
    rows = [
        (one["name"], one["metric"], name, f"{value:.4g}", f"{errors.get(name) or 0:.2g}", rows)
        for one in scores
        for errors, rows in [(one["standard_errors"], f"{one['rows']:,}")]
        for name, value in one["scores"].items()
    ]
    head = ("evaluation", "metric", "score", "value", "standard error", "rows")
    return "## Scores\n\n" + table(head, rows)
