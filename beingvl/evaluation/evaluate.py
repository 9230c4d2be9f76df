"""Step 7, evaluate: one of three kinds of work, done in parts; prints and returns the scores.

json_path     answering.Answering           answers to questions, scored by a metric
data          held_out_loss.HeldOutLoss     loss on held-out shards, computed as in training
text_parity   text_parity.TextParity        text logits compared with the base model's
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from beingvl.artefact.manifest import is_complete
from beingvl.artefact.ranks import rank_of
from beingvl.artefact.work import run_in_parts
from beingvl.data.collect_rows import open_rows
from beingvl.errors import InputError, check_at_least
from beingvl.evaluation.answering import Answering, AnswerOptions
from beingvl.evaluation.held_out_loss import HeldOutLoss
from beingvl.evaluation.metrics import METRICS
from beingvl.evaluation.results import Evaluation, SharedOptions, named_summary, print_scores
from beingvl.evaluation.text_parity import TextParity
from beingvl.inference.reading import dtype_of, own_device
from beingvl.model.start_model import find_start_model

LOSS_ON = ("response", "text", "all")


def evaluate(
    model_path: Path | str,
    output_path: Path | str,
    *,
    json_path: Path | str | Sequence[Path | str] | None = None,
    row_format: str | None = None,
    data: Path | str | None = None,
    text_parity: Path | str | None = None,
    metric: str = "exact_match",
    image_path: Path | str | Sequence[Path | str] | None = None,
    vq_codes: Path | str | None = None,
    vbpe_path: Path | str | None = None,
    raw: bool = False,
    template: str | None = None,
    max_new_tokens: int = 16,
    batch_size: int = 128,
    loss_on: str = "response",
    limit: int | None = None,
    rows_per_part: int = 512,
    torch_dtype: str | None = None,
    device: str | None = None,
    name: str | None = None,
    rank: int = 0,
    num_ranks: int = 1,
    overwrite: bool = False,
) -> dict[str, Any] | None:
    """Score a model by one of `json_path`, `data` and `text_parity`; `beingvl evaluate --help`
    describes the options.

    Returns the contents of scores.json, or None while other ranks are still working. A finished
    evaluation of the same request and `name` is reused. Raises InputError for wrong
    input before any model runs.
    """
    check_at_least(1, limit=limit, rows_per_part=rows_per_part)
    check_at_least(1, batch_size=batch_size, max_new_tokens=max_new_tokens)
    answers = AnswerOptions(
        metric, image_path, vq_codes, vbpe_path, raw, max_new_tokens, batch_size
    )
    inputs = {"json_path": json_path, "data": data, "text_parity": text_parity}
    given = [name for name, path in inputs.items() if path]
    if len(given) != 1:
        raise InputError(f"give one of --json_path, --data and --text_parity, found {len(given)}")
    if row_format and not json_path:
        raise InputError(f"--row_format has no effect on --{given[0]}; leave it out")
    _check_options(given[0], answers, loss_on, limit, template)
    model, output = find_start_model(Path(model_path)), Path(output_path)
    place = own_device(device or ("cpu" if text_parity else None))
    shared = SharedOptions(
        model,
        output,
        name or output.name,
        template,
        dtype_of(model, torch_dtype, place),
        place,
        limit,
        rows_per_part,
    )
    here = rank_of(rank, num_ranks)
    work: Evaluation
    if json_path:
        folder = output.with_name(f"{output.name}_rows")
        collected = open_rows(
            json_path, folder, row_format=row_format, rank=here, overwrite=overwrite
        )
        work = Answering(shared, collected, answers)
    elif data:
        work = HeldOutLoss(shared, Path(data), loss_on)
    else:
        assert text_parity
        work = TextParity(shared, Path(text_parity))
    run_in_parts(work, here, overwrite=overwrite, name="evaluate")
    if not is_complete(output):
        return None
    scores = named_summary(output, name)
    print_scores(scores)
    return scores


def _check_options(
    what: str, answers: AnswerOptions, loss_on: str, limit: int | None, template: str | None
) -> None:
    """Raises InputError for an unknown choice, and for an option that has no effect on `what`, the
    kind of evaluation: the user meant something else.
    """
    choices = {"metric": (answers.metric, tuple(METRICS)), "loss_on": (loss_on, LOSS_ON)}
    for option, (value, known) in choices.items():
        if value not in known:
            raise InputError(f"--{option} is {value!r}, expected one of {', '.join(known)}")
    unused = []
    if what != "json_path":
        defaults = vars(AnswerOptions())
        unused += [name for name, value in vars(answers).items() if value != defaults[name]]
    if what != "data" and loss_on != "response":
        unused.append("loss_on")
    if what == "text_parity":
        given = {"limit": limit, "template": template}
        unused += [name for name, value in given.items() if value is not None]
    if unused:
        raise InputError(f"--{unused[0]} has no effect on --{what}; leave it out")
