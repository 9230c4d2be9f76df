"""Which chat template rows, shards and models are made with (conversation.py lays them out).

Their manifests say it in `details["template"]`; a stage has one.
"""

from __future__ import annotations

from collections.abc import Mapping

from beingvl.artefact.manifest import Manifest
from beingvl.errors import InputError

TEMPLATES = DEFAULT, PUBLISHED = "default", "being-vl-0.5"


def template_of(manifest: Manifest) -> str | None:
    """Of shards or a model. Without a word it is the default one; None for a base model, which no
    rows have taught one.
    """
    is_base = manifest.kind == "model" and "identity" not in manifest.details
    return manifest.details.get("template", None if is_base else DEFAULT)


def check_template(template: str) -> str:
    if template not in TEMPLATES:
        raise InputError(f"template {template!r} is unknown, expected one of {list(TEMPLATES)}")
    return template


def join_templates(templates: Mapping[str, str | None]) -> str:
    """The one template of several inputs (name -> template). Raises InputError that names two
    with different ones.
    """
    known = [(name, template) for name, template in templates.items() if template]
    for name, template in known:
        if template != known[0][1]:
            raise InputError(
                f"{known[0][0]} is of the template {known[0][1]!r}, {name} of {template!r}; a "
                "stage has one template: tokenize the rows again with --template, or train on "
                "each apart"
            )
    return known[0][1] if known else DEFAULT


def in_request(template: str) -> dict[str, str]:
    """What requests and identities say of it: nothing of the default one, as those of before."""
    return {} if template == DEFAULT else {"template": template}
