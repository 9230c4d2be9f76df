"""`--text_parity`: compares a trained model's text logits with the base model's, on fixed texts.

Stage 1 changes only visual rows, so on texts without images the logits of the text ids are
bit-identical to the base model's. Stages 2 and 3 change the language model itself; the KL
divergence says how far.

    TextParity      both models, one after the other, on PROBE -> contents of scores.json
    expects_equal   whether the stage that made the model trained only visual rows
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from beingvl.artefact.manifest import join_lineages, read_manifest
from beingvl.artefact.request import Request
from beingvl.data.conversation import TextEncoder
from beingvl.errors import InputError
from beingvl.evaluation.metrics import mean_and_error
from beingvl.evaluation.results import Evaluation, SharedOptions
from beingvl.inference.reading import read_model
from beingvl.model.base_model import BaseModel
from beingvl.model.conversion_check import cut_head
from beingvl.model.extended_vocab import TEXT_ROWS, VISUAL_ROWS
from beingvl.model.param_groups import plan_parameters
from beingvl.stage.stage_config import rules_of
from beingvl.vocab import LAYOUT_FILE, VocabLayout

# Changing a text makes all earlier scores incomparable: only add texts at the end.
PROBE = (
    "The capital of France is Paris, and the capital of Japan is Tokyo.",
    "Water boils at one hundred degrees Celsius at sea level and freezes at zero.",
    "She opened the window, looked at the rain, and decided to stay at home with a book.",
    "In 1969 two people walked on the Moon while a third one waited in orbit above them.",
    "To make bread you need flour, water, salt and yeast; let the dough rise before you bake it.",
    "Question: What is 17 + 25? Answer: 42. Question: What is 9 x 8? Answer: 72.",
    "If all cats are animals and Tom is a cat, then Tom is an animal.",
    "def factorial(n):\n    return 1 if n < 2 else n * factorial(n - 1)\n",
    "SELECT name, COUNT(*) FROM orders WHERE year = 2024 GROUP BY name ORDER BY 2 DESC;",
    '{"id": 7, "tags": ["red", "blue"], "price": 12.5}',
    "Der Zug nach Köln fährt heute um 14:30 Uhr von Gleis 7 ab.",
    "La bibliothèque est fermée le dimanche, mais le café d'en face reste ouvert.",
    "El perro duerme debajo de la mesa mientras llueve.",
    "今天天气很好，我们去公园散步吧。",
    "Dear customer, thank you for your order. It will be shipped within three working days.",
    "The area of a circle of radius r is pi times r squared; its circumference is two pi r.",
)


class TextParity(Evaluation):
    """Both models on PROBE, in one part."""

    unit = "text"
    num_rows = len(PROBE)

    def __init__(self, shared: SharedOptions, base: Path) -> None:
        super().__init__(replace(shared, rows_per_part=self.num_rows))
        self._base = base
        base_hash = check_base(shared.model, base)
        manifest = read_manifest(shared.model, "model")
        self.lineage = manifest.lineage
        self._options = Request(
            model=manifest.content_hash, base=base_hash, torch_dtype=shared.dtype_name
        )

    def options(self) -> Request:
        return self._options

    def evaluate_rows(self, rows: range, advance: Callable[[int], object]) -> dict[str, Any]:
        """The scores:

        max_logit_difference    over all positions and text ids; 0 means bit-identical
        kl_nats                 mean over positions of KL(base || model), both over the text ids
        new_id_probability      mean probability that the model gives to ids the base lacks
        same_top_token          share of positions with the same most likely text id
        """
        model, dtype, device = self.shared.model, self.shared.dtype, self.shared.device
        layout = VocabLayout.load(model)
        encoder = TextEncoder(model, layout)
        texts = [torch.tensor([[layout.bos_id, *encoder.plain(text)]]) for text in PROBE]
        theirs, _ = probe_logits(self._base, texts, layout.num_text, dtype, device)
        ours, new_probability = probe_logits(model, texts, layout.num_text, dtype, device)
        advance(len(rows))
        pairs = list(zip(theirs, ours, strict=True))
        differences = [float((a.float() - b.float()).abs().max()) for a, b in pairs]
        kl = [value for a, b in pairs for value in kl_divergence(a, b).tolist()]
        same_top = [value for a, b in pairs for value in (a.argmax(-1) == b.argmax(-1)).tolist()]
        mean_kl, error = mean_and_error(kl)
        return {
            "metric": "text_parity",
            "rows": len(texts),
            "tokens": sum(text.shape[1] for text in texts),
            "text_ids": layout.num_text,
            "torch_dtype": self.shared.dtype_name,
            "equal_is_expected": expects_equal(model, self._base),
            "equal": all(torch.equal(a, b) for a, b in pairs),
            "scores": {
                "max_logit_difference": max(differences),
                "kl_nats": mean_kl,
                "new_id_probability": sum(new_probability) / len(new_probability),
                "same_top_token": sum(same_top) / len(same_top),
            },
            "standard_errors": {"kl_nats": error},
        }

    def combine(self, found: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], Request]:
        return found[0], self.request()


def check_base(model: Path, base: Path) -> str:
    """The base model's hash. Raises InputError for a different vocabulary, or if it is no model."""
    layout = VocabLayout.load(model)
    if not base.is_dir():
        raise InputError(
            f"--text_parity {base} is not a folder; give the base model that {model} was "
            "trained from"
        )
    opened = BaseModel.open(base)
    if is_converted(base):
        manifest = read_manifest(base, "model")
        join_lineages({str(model): {"vocab": layout.fingerprint()}, str(base): manifest.lineage})
    if opened.num_text < layout.num_text:
        raise InputError(
            f"{base} has {opened.num_text} ids, {model} has {layout.num_text} text ids: it "
            "has a different base model"
        )
    return manifest.content_hash if is_converted(base) else opened.fingerprint()


def is_converted(folder: Path) -> bool:
    """Whether a model folder has our vocabulary; if not, it is an unconverted base model."""
    return (folder / LAYOUT_FILE).is_file()


def expects_equal(model: Path, base: Path) -> bool:
    """Whether it is only converted, or its training from `base` changed only visual rows."""
    identity = read_manifest(model, "model").details.get("identity")
    if identity is None:
        return True
    if is_converted(base) and identity["start_model"] != read_manifest(base, "model").content_hash:
        return False
    opened = BaseModel.open(model)
    shapes = {}
    for name in opened.weights:
        split = name in (opened.input_name, opened.output_name)
        stem = name.rpartition(".")[0]
        for part in (f"{stem}.{TEXT_ROWS}", f"{stem}.{VISUAL_ROWS}") if split else (name,):
            shapes[part] = tuple(opened.weights.shape(name))
    plan = plan_parameters(shapes, rules_of(identity["trainable"]))
    return all(planned.name.endswith(f".{VISUAL_ROWS}") for planned in plan if planned.is_trained)


@torch.inference_mode()
def probe_logits(
    folder: Path,
    texts: Sequence[torch.Tensor],
    num_text: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[list[torch.Tensor], list[float]]:
    """Logits of the text ids `[tokens, num_text]` for every text, and the probability of all other
    ids at every position.
    """
    model: Any = read_model(folder, dtype, device)
    new_probability: list[float] = []
    for text in texts:
        logits = model(input_ids=text.to(device), use_cache=False).logits[0].double()
        new_probability += logits.softmax(-1)[:, num_text:].sum(-1).tolist()
    cut_head(model, num_text)
    found = [model(input_ids=text.to(device), use_cache=False).logits[0].cpu() for text in texts]
    del model
    gc.collect()
    return found, new_probability


def kl_divergence(base: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """KL(base || model) in nats at every position, from logits `[positions, ids]`."""
    theirs, ours = base.double().log_softmax(-1), model.double().log_softmax(-1)
    return (theirs.exp() * (theirs - ours)).sum(-1)
