"""A stage's JSON: DeepSpeed's own keys (deepspeed_keys.py) and one block "beingvl", validated
before anything is built.

    load_stage_config(path, overrides) -> StageConfig(deepspeed=dict, beingvl=BeingVLBlock)

An unknown key anywhere is an error with "did you mean". The table of keys in
docs/reference/stage-json.md is generated from the fields below.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from beingvl.errors import InputError
from beingvl.json_file import read_object
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
    check,
    check_present,
    key,
    maybe,
    number,
    one_of,
    required_keys,
    schema_of,
    whole,
)

LONGEST_SEQUENCE = 1 << 24  # the packer holds a list with this many entries
SHARES = Allowed("an object of source -> share", OBJECT.holds)


@dataclass(frozen=True)
class Lora:
    """Adapters beside frozen linear layers (model/adapters.py)."""

    rank: int = key(whole(1, 1 << 16), "of the product that is added to a weight")
    alpha: float = key(POSITIVE, "the product is multiplied by alpha / rank")
    base: str | None = key(
        maybe(one_of("nf4")), "nf4: the weight beside them is kept in 4 bits (ZeRO 1 or 2)", None
    )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class Rule:
    """One rule of the freezer (model/param_groups.py)."""

    match: str = key(TEXT, "a group of parameters, or a regular expression over their names")
    train: bool = key(SWITCH, "false: frozen", True)
    lr_multiplier: float = key(FACTOR, "of the learning rate", 1.0)
    weight_decay: float | None = key(maybe(FACTOR), "null: the optimizer's own", None)
    lora: Lora | None = key(  # noqa: RUF009  a field, not an object
        schema_of(Lora), "train adapters beside the linear layers, which stay frozen", None
    )


def rules_of(trainable: Sequence[Mapping[str, Any]]) -> tuple[Rule, ...]:
    """The rules of a stage's JSON, or of a run's identity, as objects."""
    return tuple(
        Rule(**{**rule, "lora": Lora(**rule["lora"]) if rule.get("lora") else None})
        for rule in trainable
    )


same_result = partial(key, changes_result=False)

_ABSENT = (("lora", None), ("base", None))


@dataclass(frozen=True)
class BeingVLBlock:
    """The block "beingvl" of a stage's JSON."""

    epochs: float = key(POSITIVE, "passes over all samples of the drawn sources together")
    sequence_length: int = key(
        whole(1, LONGEST_SEQUENCE), "tokens of a packed sequence; no sample may be longer"
    )
    mixture: dict[str, float] = key(  # noqa: RUF009  a field, not a dictionary
        SHARES,
        "source -> share; a source is a sample's `category`. If no dataset row names one, all "
        "samples are drawn instead",
    )
    trainable: tuple[Rule, ...] = key([schema_of(Rule)], "the freezer's rules, see below")
    mixture_by: str = key(
        one_of("samples", "tokens"),
        "what the shares count; the realised shares of both are printed before step 1",
        "samples",
    )
    max_steps: int | None = key(
        maybe(whole(1)), "end the run, and its learning-rate schedule, after this many steps", None
    )
    loss_on: str = key(
        one_of("response", "text", "all"),
        "`response`: answers and their eos; `text`: everything but image tokens",
        "response",
    )
    packing: bool = key(SWITCH, "false: one sample per sequence", True)
    seed: int = key(whole(0), "of the data order, and of new adapters", 0)
    schedule: str = key(
        one_of("cosine", "constant"),
        "learning rate after the warm-up, a pure function of the step",
        "cosine",
    )
    warmup_ratio: float = key(number(0, 1), "share of the steps with a linear warm-up", 0.03)
    min_lr_ratio: float = key(number(0, 1), "where the cosine ends, as a share of the peak", 0.0)
    activation_checkpointing: bool = same_result(
        SWITCH, "recompute layers in the backward pass, to save memory", True
    )
    loss_chunk_tokens: int = same_result(
        whole(1), "target tokens whose logits are in memory at the same time", 256
    )
    checkpoint_every_steps: int = same_result(
        whole(0), "0: not by steps; one is always written at the end", 500
    )
    checkpoint_every_minutes: float = same_result(number(0), "as above; whichever comes first", 0)
    background_save: bool = same_result(
        SWITCH,
        "a thread writes the checkpoint from a copy in host memory (12 bytes per trained "
        "parameter, divided by the ranks) while training continues",
        False,
    )
    final: str = same_result(
        one_of("merged", "adapter"),
        "with `lora`: `merged`, a whole model, with the adapters in PEFT's format in `adapter/` "
        "beside it; `adapter`: only the adapters",
        "merged",
    )
    keep_last: int = same_result(whole(1), "number of newest checkpoints to keep", 2)
    keep_every: int = same_result(
        whole(0), "also keep checkpoints whose step is a multiple of this; 0: none", 0
    )
    validation_every_steps: int = same_result(
        whole(0), "together with `--validation_data`; 0: never", 0
    )
    log_every_steps: int = same_result(
        whole(1),
        "steps per line of metrics: its last step's figures, and the seconds of saving and "
        "validation since the previous line",
        1,
    )
    tensorboard: bool = same_result(SWITCH, "also write metrics for TensorBoard", True)
    max_skipped_steps: int = same_result(
        whole(1), "end after this many steps in a row that are not finite", 5
    )
    stall_timeout_seconds: int = same_result(
        whole(1),
        "after this time the other ranks give up on a rank that makes no progress. It must cover "
        "the longest single part: loading or hashing one parameter, one micro-batch or validation "
        "batch, writing 256 MB of a slice to the disk, DeepSpeed's own start; a whole start, save "
        "or validation pass may take any time",
        600,
    )
    deterministic: bool = same_result(
        SWITCH,
        "use only kernels whose results are bit-identical every time: slower on a GPU, but needed "
        "there for a resumed run to be bit-identical to an uninterrupted one",
        False,
    )


def as_written(block: BeingVLBlock) -> dict[str, Any]:
    """The block's fields. `lora` and `base` are left out if None: older checkpoints have neither,
    and their identities must still match.
    """
    return asdict(
        block,
        dict_factory=lambda fields: {
            name: value for name, value in fields if (name, value) not in _ABSENT
        },
    )


@dataclass(frozen=True)
class StageConfig:
    """A validated stage: DeepSpeed's keys and our block. `source`: the file, for messages."""

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
        return self.deepspeed["zero_optimization"]["stage"]

    @property
    def is_bf16(self) -> bool:
        return bool(self.deepspeed.get("bf16", {}).get("enabled", False))

    @property
    def nvme_offloads(self) -> dict[str, dict[str, Any]]:
        """`offload_optimizer` and `offload_param`, those that go to NVMe."""
        zero = self.deepspeed["zero_optimization"]
        return {
            name: zero[name]
            for name in OFFLOAD_KEYS
            if (zero.get(name) or {}).get("device") == "nvme"
        }

    def accumulation_steps(self, num_ranks: int) -> int:
        """Micro-steps per optimizer step. Raises InputError if the batch is not divisible."""
        per_micro_step = self.micro_batch_size * num_ranks
        if self.sequences_per_step % per_micro_step:
            raise InputError(
                f"{self.source}: train_batch_size {self.sequences_per_step} is not a multiple of "
                f"{self.micro_batch_size} (micro-batch) x {num_ranks} (ranks) = "
                f"{per_micro_step}; {self.batches_beside(per_micro_step)}"
            )
        return self.sequences_per_step // per_micro_step

    def batches_beside(self, divisor: int) -> str:
        """The nearest batch sizes that are divisible, and Adam's learning rate for them: it scales
        with the square root of the batch size (Malladi et al. 2022, arXiv 2205.10287).
        """
        below = self.sequences_per_step // divisor * divisor
        choices = " or ".join(
            f"train_batch_size={batch} optimizer.params.lr="
            f"{self.learning_rate * math.sqrt(batch / self.sequences_per_step):.3g}"
            for batch in (below, below + divisor)
            if batch
        )
        return f"the nearest that are: --set {choices} (Adam's rate scales with the batch's root)"


def load_stage_config(path: Path | str, overrides: Sequence[str] = ()) -> StageConfig:
    """Read, override (`beingvl.epochs=1`) and validate. Raises InputError with file and key."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist; stage configurations are in ds_configs/")
    fields = read_object(path)
    for override in overrides:
        apply_override(fields, override)
    return parse_stage_config(fields, str(path))


def apply_override(fields: dict, override: str) -> None:
    """Set `a.b.c=value` in nested dicts; a value that is not JSON is text."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise InputError(f"--set {override!r}: expected KEY=VALUE, for example beingvl.epochs=1")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    except (ValueError, RecursionError) as error:
        raise InputError(f"--set {path}: {error}") from error
    *parents, last = path.split(".")
    for parent in parents:
        fields = fields.setdefault(parent, {})
        if not isinstance(fields, dict):
            raise InputError(f"--set {override!r}: {parent!r} is not an object")
    fields[last] = value


def parse_stage_config(fields: Mapping[str, Any], source: str) -> StageConfig:
    """Validate a stage's JSON object; every complaint names `source`."""
    refuse_keys(fields, source)
    check(fields, {**DEEPSPEED_KEYS, "beingvl": schema_of(BeingVLBlock)}, source)
    unsafe = "; write it out, DeepSpeed's default for it is not safe here"
    check_present(fields, REQUIRED_KEYS, source, unsafe)
    needed = [f"beingvl.{name}" for name in required_keys(BeingVLBlock)]
    check_present(fields, needed, source)
    check_offload(fields["zero_optimization"], source)
    block = fields["beingvl"]
    for at, rule in enumerate(block["trainable"]):
        place = f"{source}: beingvl.trainable[{at}]"
        check_present(rule, required_keys(Rule), place)
        if "lora" in rule:
            check_present(rule["lora"], required_keys(Lora), f"{place}.lora")
            if not rule.get("train", True):
                raise InputError(f"{place} has lora and train false; leave one of them out")
            if rule["lora"].get("base") and fields["zero_optimization"]["stage"] == 3:
                raise InputError(
                    f"{place}.lora.base is 'nf4', and ZeRO-3 cuts every weight as it is made, "
                    "before its blocks of 64 have scales; set zero_optimization.stage to 2"
                )
    rules = rules_of(block["trainable"])
    if block.get("final") == "adapter" and not any(rule.lora for rule in rules):
        raise InputError(
            f"{source}: beingvl.final is 'adapter', and no rule has lora; leave it out"
        )
    deepspeed = {name: value for name, value in fields.items() if name != "beingvl"}
    config = StageConfig(deepspeed, BeingVLBlock(**{**block, "trainable": rules}), source)
    if "offload_param" in config.nvme_offloads and any(rule.lora for rule in rules):
        raise InputError(
            f"{source}: zero_optimization.offload_param goes to nvme and a rule has lora, which "
            'was never tried together; take "device": "cpu"'
        )
    return config
