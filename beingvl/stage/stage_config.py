"""A stage's JSON: DeepSpeed's own keys (deepspeed_keys.py) and one block "beingvl", validated
before anything is built.

    load_stage_config(path, overrides) -> StageConfig(deepspeed=dict, beingvl=BeingVLBlock)

An unknown key anywhere is an error with "did you mean".
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeAlias, get_type_hints

from beingvl.errors import InputError
from beingvl.stage.deepspeed_keys import (
    DEEPSPEED_KEYS,
    FACTOR,
    OFFLOAD_KEYS,
    REQUIRED_KEYS,
    check_offload,
    refuse_keys,
)
from beingvl.stage.json_schema import (
    OBJECT,
    POSITIVE,
    SWITCH,
    TEXT,
    Allowed,
    Schema,
    check,
    check_present,
    maybe,
    number,
    one_of,
    whole,
)

LONGEST_SEQUENCE = 1 << 24  # the packer holds a list of so many entries
SHARES = Allowed("an object of source -> share", OBJECT.holds)
RULE: Schema = {
    "match": TEXT,
    "train": SWITCH,
    "lr_multiplier": FACTOR,
    "weight_decay": maybe(FACTOR),
}

Positive: TypeAlias = Annotated[float, POSITIVE]
NotNegative: TypeAlias = Annotated[float, number(0)]
Fraction: TypeAlias = Annotated[float, number(0, 1)]
Count: TypeAlias = Annotated[int, whole(0)]
AtLeastOne: TypeAlias = Annotated[int, whole(1)]
Switch: TypeAlias = Annotated[bool, SWITCH]


@dataclass(frozen=True)
class Rule:
    """One rule. `weight_decay` None means the optimizer's own."""

    match: str
    train: bool = True
    lr_multiplier: float = 1.0
    weight_decay: float | None = None


@dataclass(frozen=True)
class BeingVLBlock:
    """The block "beingvl" of a stage's JSON.

    mixture: source -> share. mixture_by: shares of `samples` or of `tokens`. epochs: passes over
    all samples of the drawn sources together. max_steps: stop earlier. loss_on: `response`, `text`
    or `all`. schedule: `cosine` or `constant`, after a linear warm-up over warmup_ratio of the
    steps, down to min_lr_ratio of the peak. trainable: the freezer's rules. checkpoint_every_steps,
    checkpoint_every_minutes: 0 means not for this reason; one is written at the end always.
    background_save: a thread writes it from a copy in host memory while training goes on.
    keep_last: how many checkpoints stay, and keep_every: those of every so many steps stay as well.
    loss_chunk_tokens: target tokens whose logits exist at a time. validation_every_steps: 0 means
    never. stall_timeout_seconds: when a rank that finishes no part of its work is given up.
    deterministic: only kernels that give the same bits every time, which on a GPU are slower.
    """

    epochs: Positive
    sequence_length: Annotated[int, whole(1, LONGEST_SEQUENCE)]
    mixture: Annotated[dict[str, float], SHARES]
    trainable: Annotated[tuple[Rule, ...], [RULE]]
    mixture_by: Annotated[str, one_of("samples", "tokens")] = "samples"
    max_steps: Annotated[int | None, maybe(whole(1))] = None
    loss_on: Annotated[str, one_of("response", "text", "all")] = "response"
    packing: Switch = True
    seed: Count = 0
    schedule: Annotated[str, one_of("cosine", "constant")] = "cosine"
    warmup_ratio: Fraction = 0.03
    min_lr_ratio: Fraction = 0.0
    activation_checkpointing: Switch = True
    loss_chunk_tokens: AtLeastOne = 256
    checkpoint_every_steps: Count = 500
    checkpoint_every_minutes: NotNegative = 0
    background_save: Switch = False
    keep_last: AtLeastOne = 2
    keep_every: Count = 0
    validation_every_steps: Count = 0
    log_every_steps: AtLeastOne = 1
    tensorboard: Switch = True
    max_skipped_steps: AtLeastOne = 5
    stall_timeout_seconds: AtLeastOne = 600
    deterministic: Switch = False


@dataclass(frozen=True)
class StageConfig:
    """A validated stage. `deepspeed` holds DeepSpeed's keys only; `source` names the file for
    messages.
    """

    deepspeed: dict[str, Any]
    beingvl: BeingVLBlock
    source: str = field(compare=False)

    @property
    def sequences_per_step(self) -> int:
        return self.deepspeed["train_batch_size"]

    @property
    def micro_batch_size(self) -> int:
        return self.deepspeed["train_micro_batch_size_per_gpu"]

    @property
    def learning_rate(self) -> float:
        return self.deepspeed["optimizer"]["params"]["lr"]

    @property
    def weight_decay(self) -> float:
        return self.deepspeed["optimizer"]["params"].get("weight_decay", 0.0)

    @property
    def second_moment_decay(self) -> float:
        """Adam's second beta."""
        return self.deepspeed["optimizer"]["params"].get("betas", (0.9, 0.999))[1]

    @property
    def zero_stage(self) -> int:
        return self.deepspeed["zero_optimization"].get("stage", 0)

    @property
    def is_bf16(self) -> bool:
        return bool(self.deepspeed.get("bf16", {}).get("enabled", False))

    @property
    def nvme_offloads(self) -> dict[str, dict[str, Any]]:
        """`offload_optimizer` and `offload_param`, as far as they go to NVMe."""
        zero = self.deepspeed["zero_optimization"]
        return {
            key: zero[key] for key in OFFLOAD_KEYS if (zero.get(key) or {}).get("device") == "nvme"
        }

    def accumulation_steps(self, num_ranks: int) -> int:
        """Micro steps in an optimizer step. Raises InputError when the batch does not divide."""
        per_micro_step = self.micro_batch_size * num_ranks
        if self.sequences_per_step % per_micro_step:
            raise InputError(
                f"{self.source}: train_batch_size {self.sequences_per_step} is not a multiple of "
                f"{self.micro_batch_size} (micro-batch) x {num_ranks} (ranks) = "
                f"{per_micro_step}; change one of them"
            )
        return self.sequences_per_step // per_micro_step


def load_stage_config(path: Path | str, overrides: Sequence[str] = ()) -> StageConfig:
    """Read, override (`beingvl.epochs=1`) and validate. Raises InputError that names file and
    key.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist; stage configurations are in ds_configs/")
    try:
        fields = json.loads(path.read_text())
    except (
        ValueError,
        RecursionError,
    ) as error:  # a ValueError also of bytes that are no text, or of thousands of digits
        raise InputError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(fields, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(fields).__name__}")
    for override in overrides:
        apply_override(fields, override)
    return parse_stage_config(fields, str(path))


def apply_override(fields: dict, override: str) -> None:
    """Set `a.b.c=value` in nested dicts; the value is JSON, or text when it is not."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"--set {override!r}: expected KEY=VALUE, for example beingvl.epochs=1")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    except (ValueError, RecursionError) as error:
        raise InputError(f"--set {key}: {error}") from error
    *parents, last = key.split(".")
    for parent in parents:
        fields = fields.setdefault(parent, {})
        if not isinstance(fields, dict):
            raise InputError(f"--set {override!r}: {parent!r} is not an object")
    fields[last] = value


def parse_stage_config(fields: Mapping[str, Any], source: str) -> StageConfig:
    """Validate a stage's JSON object; every complaint names `source`."""
    refuse_keys(fields, source)
    hints = get_type_hints(BeingVLBlock, include_extras=True)
    block_keys = {name: hint.__metadata__[0] for name, hint in hints.items()}
    check(fields, {**DEEPSPEED_KEYS, "beingvl": block_keys}, source)
    check_present(
        fields, REQUIRED_KEYS, source, "; write it out, DeepSpeed's default for it is not safe here"
    )
    needed = [
        entry.name
        for entry in dataclasses.fields(BeingVLBlock)
        if entry.default is dataclasses.MISSING
    ]
    check_present(fields, ["beingvl", *(f"beingvl.{name}" for name in needed)], source)
    check_offload(fields["zero_optimization"], source)
    block = fields["beingvl"]
    for at, rule in enumerate(block["trainable"]):
        check_present(rule, ["match"], f"{source}: beingvl.trainable[{at}]")
    rules = tuple(Rule(**rule) for rule in block["trainable"])
    deepspeed = {key: value for key, value in fields.items() if key != "beingvl"}
    return StageConfig(deepspeed, BeingVLBlock(**{**block, "trainable": rules}), source)
