"""A stage's JSON: DeepSpeed's own keys plus one block "beingvl", validated strictly before anything is built.

    load_stage_config(path, overrides) -> StageConfig(deepspeed=dict, beingvl=BeingVLBlock)

An unknown key anywhere is an error with "did you mean"; DeepSpeed itself accepts unknown top-level keys silently. Some of its
defaults hurt silently, so they must be written: gradient_clipping (defaults to 1.0), train_batch_size (must not depend on the
number of ranks). `scheduler` is refused: the learning rate is a pure function of the step (beingvl.schedule).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from beingvl.errors import InputError
from beingvl.model.param_groups import Rule

# Of "bf16": both must be false.
FLOAT32_KEYS = ("bf16_master_weights_and_grads", "bf16_optimizer_states")
# DeepSpeed keys that a stage may use. None: any value (DeepSpeed checks it itself); a set: the allowed keys inside.
# Source: https://www.deepspeed.ai/docs/config-json/ and deepspeed/runtime/constants.py of 0.19.
DEEPSPEED_KEYS: dict[str, set[str] | None] = {
    "train_batch_size": None,
    "train_micro_batch_size_per_gpu": None,
    "optimizer": {"type", "params"},
    "gradient_clipping": None,
    "bf16": {"enabled", "immediate_grad_update", "check_grad_overflow", *FLOAT32_KEYS},
    "zero_optimization": None,
    "zero_allow_untested_optimizer": None,
    "zero_force_ds_cpu_optimizer": None,
    "communication_data_type": None,
    "steps_per_print": None,
    "wall_clock_breakdown": None,
    "memory_breakdown": None,
    "dump_state": None,
    "aio": {"block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events", "use_gds"},
    "comms_logger": {"enabled", "verbose", "prof_all", "prof_ops", "debug"},
    "flops_profiler": {"enabled", "profile_step", "module_depth", "top_modules", "detailed", "output_file"},
    "timers": {"throughput"},
}
COMMUNICATION_TYPES = ("fp32", "bf16", "fp16", None)
REFUSED_KEYS = {
    "scheduler": "the learning rate is a pure function of the step: use beingvl.schedule and beingvl.warmup_ratio",
    "gradient_accumulation_steps": "it follows from train_batch_size, the micro-batch size and the number of ranks; remove it",
    "fp16": "loss scaling makes steps depend on history: use bf16 or neither",
    "tensorboard": "metrics are beingvl's own: beingvl.tensorboard",
    "seed": "the data order's seed is beingvl.seed, and nothing else is drawn",
    "compile": "DeepSpeed's compilation is not used here; remove it",
    "data_efficiency": "the data order is beingvl's own: beingvl.mixture",
    "activation_checkpointing": "it is beingvl's own: beingvl.activation_checkpointing",
    "prescale_gradients": "ZeRO refuses it; the loss is divided by all ranks' target tokens before its gradient is taken",
    "gradient_predivide_factor": "ZeRO refuses it; the loss is divided by all ranks' target tokens before its gradient is taken",
}
# Keys of "zero_optimization"; DeepSpeed takes those of stage 3 with and without the prefix.
STAGE3_KEYS = {
    "prefetch_bucket_size",
    "param_persistence_threshold",
    "model_persistence_threshold",
    "max_live_parameters",
    "max_reuse_distance",
    "gather_16bit_weights_on_model_save",
    "use_all_reduce_for_fetch_params",
    "allgather_sequential",
}
ZERO_KEYS = STAGE3_KEYS | {f"stage3_{key}" for key in STAGE3_KEYS}
ZERO_KEYS |= {
    "stage",
    "contiguous_gradients",
    "reduce_scatter",
    "reduce_bucket_size",
    "use_multi_rank_bucket_allreduce",
    "allgather_partitions",
    "allgather_bucket_size",
    "overlap_comm",
    "compute_grad_norm",
    "offload_param",
    "offload_optimizer",
    "sub_group_size",
    "ignore_unused_parameters",
    "memory_efficient_linear",
    "override_module_apply",
    "log_trace_cache_warnings",
    "enable_sanity_checks",
}
OFFLOAD_KEYS = {
    "offload_optimizer": {"device", "pin_memory", "nvme_path", "buffer_count", "pipeline_read", "pipeline_write"},
    "offload_param": {"device", "pin_memory", "nvme_path", "buffer_count", "buffer_size", "max_in_cpu"},
}
# With weights on NVMe, where buffers are few. Fetched ahead, a weight that a step uses twice would be given a second one (an
# assertion of DeepSpeed 0.19.8); kept for later or for ever, it would block its own. Those below 1 MB are in memory anyway.
AHEAD_KEYS = ("stage3_prefetch_bucket_size", "stage3_max_reuse_distance")
LARGEST_ON_NVME = {**dict.fromkeys(AHEAD_KEYS, 0), "stage3_param_persistence_threshold": 200_000}
# Key -> the value that switches it off, and why it must be. Tried on two CPU ranks (DeepSpeed 0.19.8), but for quantization.
REFUSED_ZERO_KEYS: dict[str, tuple[object, str]] = {
    "round_robin_gradients": (
        False,
        "with it DeepSpeed tells wrong places of masters and moments, and checkpoints would be wrong",
    ),
    "zero_hpz_partition_size": (1, "its second copy of the weights is not loaded, and the first loss is no number"),
    "stage3_module_granularity_threshold": (0, "rows in two parts would be looked up while only one rank's share is there"),
    "module_granularity_threshold": (0, "rows in two parts would be looked up while only one rank's share is there"),
    "zero_quantized_weights": (False, "weights must pass between ranks as they are"),
    "zero_quantized_nontrainable_weights": (False, "weights must pass between ranks as they are"),
    "zero_quantized_gradients": (False, "gradients must pass between ranks as they are"),
}
# Of DeepSpeed's keys, wherever they stand, those that are true or false and those that are whole numbers. DeepSpeed takes the
# text "false" for false in one place and for true in another, and stumbles over other types when the model is built, or later.
SWITCHES = {
    *("enabled", "immediate_grad_update", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "wall_clock_breakdown"),
    *("memory_breakdown", "dump_state", "single_submit", "overlap_events", "use_gds", "verbose", "prof_all", "debug", "detailed"),
    *("synchronized", "adam_w_mode", "fused", "pin_memory", "pipeline_read", "pipeline_write", "contiguous_gradients"),
    *("reduce_scatter", "use_multi_rank_bucket_allreduce", "allgather_partitions", "overlap_comm", "ignore_unused_parameters"),
    *("memory_efficient_linear", "override_module_apply", "log_trace_cache_warnings", "enable_sanity_checks"),
    *("gather_16bit_weights_on_model_save", "use_all_reduce_for_fetch_params", "allgather_sequential"),
}
WHOLE_NUMBERS = {
    *("block_size", "queue_depth", "intra_op_parallelism", "profile_step", "top_modules", "steps_per_print", "buffer_count"),
    *("buffer_size", "max_in_cpu", "reduce_bucket_size", "allgather_bucket_size", "sub_group_size", "prefetch_bucket_size"),
    *("param_persistence_threshold", "model_persistence_threshold", "max_live_parameters", "max_reuse_distance"),
}
LONGEST_SEQUENCE = 1 << 24  # the packer holds a list of so many entries
LARGEST_NUMBER = 1e6  # of what multiplies weights or gradients: far above any use, far below what float32 can hold
OPTIMIZER_PARAMS = {"lr", "betas", "eps", "weight_decay", "torch_adam", "adam_w_mode", "fused"}
REQUIRED_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "optimizer",
    "gradient_clipping",
    "zero_optimization",
    "beingvl",
)


@dataclass(frozen=True)
class BeingVLBlock:
    """The block "beingvl" of a stage's JSON.

    mixture: source -> share. mixture_by: shares of `samples` or of `tokens`. epochs: passes over all samples of the drawn
    sources together. max_steps: stop earlier. loss_on: `response`, `text` or `all`. schedule: `cosine` or `constant`, after a
    linear warm-up over warmup_ratio of the steps, down to min_lr_ratio of the peak. trainable: the freezer's rules.
    checkpoint_every_steps, checkpoint_every_minutes: 0 means not for this reason; one is written at the end always.
    background_save: a thread writes it from a copy in host memory while training goes on. keep_last: how many checkpoints
    stay, and keep_every: those of every so many steps stay as well. loss_chunk_tokens: target tokens whose logits exist at a
    time. validation_every_steps: 0 means never. stall_timeout_seconds: when a rank that finishes no part of its work is
    given up. deterministic: only kernels that give the same bits every time, which on a GPU are slower.
    """

    epochs: float
    sequence_length: int
    mixture: dict[str, float]
    trainable: tuple[Rule, ...]
    mixture_by: str = "samples"
    max_steps: int | None = None
    loss_on: str = "response"
    packing: bool = True
    seed: int = 0
    schedule: str = "cosine"
    warmup_ratio: float = 0.03
    min_lr_ratio: float = 0.0
    activation_checkpointing: bool = True
    loss_chunk_tokens: int = 256
    checkpoint_every_steps: int = 500
    checkpoint_every_minutes: float = 0
    background_save: bool = False
    keep_last: int = 2
    keep_every: int = 0
    validation_every_steps: int = 0
    log_every_steps: int = 1
    tensorboard: bool = True
    max_skipped_steps: int = 5
    stall_timeout_seconds: int = 600
    deterministic: bool = False


CHOICES = {
    "mixture_by": ("samples", "tokens"),
    "loss_on": ("response", "text", "all"),
    "schedule": ("cosine", "constant"),
}


@dataclass(frozen=True)
class StageConfig:
    """A validated stage. `deepspeed` holds DeepSpeed's keys only; `source` names the file for messages."""

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
        return {key: zero[key] for key in OFFLOAD_KEYS if (zero.get(key) or {}).get("device") == "nvme"}

    def accumulation_steps(self, num_ranks: int) -> int:
        """Micro steps in an optimizer step. Raises InputError when the batch does not divide."""
        per_micro_step = self.micro_batch_size * num_ranks
        if self.sequences_per_step % per_micro_step:
            raise InputError(
                f"{self.source}: train_batch_size {self.sequences_per_step} is not a multiple of "
                f"{self.micro_batch_size} (micro-batch) x {num_ranks} (ranks) = {per_micro_step}; change one of them"
            )
        return self.sequences_per_step // per_micro_step


def load_stage_config(path: Path | str, overrides: Sequence[str] = ()) -> StageConfig:
    """Read, override (`beingvl.epochs=1`) and validate. Raises InputError that names file and key."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist; stage configurations are in ds_configs/")
    try:
        fields = json.loads(path.read_text())
    except json.JSONDecodeError as error:
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
    *parents, last = key.split(".")
    for parent in parents:
        fields = fields.setdefault(parent, {})
        if not isinstance(fields, dict):
            raise InputError(f"--set {override!r}: {parent!r} is not an object")
    fields[last] = value


def parse_stage_config(fields: Mapping[str, Any], source: str) -> StageConfig:
    """Validate a stage's JSON object; every complaint names `source`."""
    for key, reason in REFUSED_KEYS.items():
        if key in fields:
            raise InputError(f"{source}: {key!r} is not for a beingvl stage: {reason}")
    _check_known(fields, {*DEEPSPEED_KEYS, "beingvl"}, source, "")
    for key in REQUIRED_KEYS:
        if key not in fields:
            raise InputError(f"{source}: {key!r} is missing; write it out, DeepSpeed's default for it is not safe here")
    for key, allowed in DEEPSPEED_KEYS.items():
        if allowed and key in fields:
            _check_known(fields[key], allowed, source, f"{key}.")
    _check_known(fields["optimizer"].get("params", {}), OPTIMIZER_PARAMS, source, "optimizer.params.")
    if fields["optimizer"].get("type") not in ("Adam", "AdamW") or "lr" not in fields["optimizer"].get("params", {}):
        raise InputError(f"{source}: optimizer must be of type Adam or AdamW with params.lr")
    _check_numbers(fields, source)
    if fields["optimizer"]["params"].get("torch_adam") is not True:
        raise InputError(f"{source}: optimizer.params.torch_adam must be true; checkpoints restore the moments of torch's Adam")
    if fields.get("bf16", {}).get("check_grad_overflow", True) is not True:
        raise InputError(f"{source}: bf16.check_grad_overflow must be true, or weights that are not finite would be kept")
    for key in FLOAT32_KEYS:
        if fields.get("bf16", {}).get(key, False) is not False:
            raise InputError(f"{source}: bf16.{key} must be false; checkpoints hold masters and moments in float32")
    _check_zero(fields["zero_optimization"], source)
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu"):
        if isinstance(fields[key], bool) or not isinstance(fields[key], int) or fields[key] < 1:
            raise InputError(f"{source}: {key} is {fields[key]!r}, expected an integer of at least 1")
    _check_known(fields.get("timers", {}).get("throughput", {}), {"enabled", "synchronized"}, source, "timers.throughput.")
    deepspeed = {key: value for key, value in fields.items() if key != "beingvl"}
    _check_types(deepspeed, f"{source}: ")
    if deepspeed.get("communication_data_type") not in COMMUNICATION_TYPES:
        found = f"{source}: communication_data_type is {deepspeed['communication_data_type']!r}"
        raise InputError(f"{found}, expected one of {COMMUNICATION_TYPES}")
    return StageConfig(deepspeed, _parse_block(fields["beingvl"], source), source)


def _check_numbers(fields: Mapping[str, Any], source: str) -> None:
    """What torch and DeepSpeed would only stumble over when the model is loaded, or never."""
    params = fields["optimizer"]["params"]
    named = {f"optimizer.params.{key}": params[key] for key in ("lr", "eps", "weight_decay") if key in params}
    for key, value in {**named, "gradient_clipping": fields["gradient_clipping"]}.items():
        _check_number(f"{source}: {key}", value)
    betas = params.get("betas", [0, 0])
    if not isinstance(betas, list) or len(betas) != 2 or not all(_is_at_most(0, beta) and beta < 1 for beta in betas):
        raise InputError(f"{source}: optimizer.params.betas is {betas!r}, expected two numbers from 0 to below 1")


def _check_types(fields: Mapping[str, Any], prefix: str) -> None:
    """Of DeepSpeed's keys, in objects inside `fields`, too; `prefix` is what stands before a key in a complaint."""
    for key, value in fields.items():
        name, fewest = key.removeprefix("stage3_"), int(key == "steps_per_print")  # which DeepSpeed divides by
        if isinstance(value, Mapping):
            _check_types(value, f"{prefix}{key}.")
        elif name in SWITCHES and not isinstance(value, bool):
            raise InputError(f"{prefix}{key} is {value!r}, expected true or false")
        elif key == "prof_ops" and not isinstance(value, list):
            raise InputError(f"{prefix}{key} is {value!r}, expected a list of names")
        elif name in WHOLE_NUMBERS and not (_is_at_most(fewest, value) and value < math.inf and value == int(value)):
            raise InputError(f"{prefix}{key} is {value!r}, expected a whole number of at least {fewest}")


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not (_is_at_most(0, value) and _is_at_most(value, LARGEST_NUMBER)):
        raise InputError(f"{name} is {value!r}, expected a number from 0 to {LARGEST_NUMBER:g}")


def _check_zero(zero: Mapping[str, Any], source: str) -> None:
    """The stage must be written out, what is offloaded must be resumable, and nothing cuts parameters in another way."""
    _check_known(zero, ZERO_KEYS | set(REFUSED_ZERO_KEYS), source, "zero_optimization.")
    for key, (off, reason) in REFUSED_ZERO_KEYS.items():
        if zero.get(key, off) != off:
            raise InputError(f"{source}: zero_optimization.{key} must be {json.dumps(off)}: {reason}")
    if zero.get("stage") not in (0, 1, 2, 3):
        raise InputError(f"{source}: zero_optimization.stage is {zero.get('stage')!r}, expected 0, 1, 2 or 3")
    if zero.get("compute_grad_norm", True) is not True:
        raise InputError(
            f"{source}: zero_optimization.compute_grad_norm must be true; steps that are not finite show in the norm"
        )
    for key, fewest in (("sub_group_size", 0), ("reduce_bucket_size", 1), ("allgather_bucket_size", 1)):
        if not _is_at_most(fewest, zero.get(key, 1)):
            raise InputError(f"{source}: zero_optimization.{key} is {zero[key]!r}, expected a number of at least {fewest}")
    for key, known in OFFLOAD_KEYS.items():
        _check_offload({} if zero.get(key) is None else zero[key], f"zero_optimization.{key}", known, zero["stage"], source)
    if (zero.get("offload_param") or {}).get("device") == "nvme":
        for name, largest in LARGEST_ON_NVME.items():
            for key in (name, name.removeprefix("stage3_")):
                if not _is_at_most(zero.get(key, 0), largest):
                    found = f"{source}: zero_optimization.{key} is {zero[key]!r}"
                    raise InputError(f"{found}, expected {largest} at most with offload_param on NVMe, where buffers are few")


def _check_offload(offload: Mapping[str, Any], key: str, known: set[str], stage: int, source: str) -> None:
    _check_known(offload, known, source, f"{key}.")
    device = offload.get("device", "none")
    if device not in ("none", "cpu", "nvme"):
        raise InputError(f"{source}: {key}.device is {device!r}, expected 'none', 'cpu' or 'nvme'")
    if device != "none" and stage < (1 if device == "cpu" and key.endswith("optimizer") else 3):
        raise InputError(f"{source}: {key} needs a higher stage than {stage} for the device {device!r}; remove it")
    if device != "nvme":
        return
    for name in offload.keys() & {"buffer_count", "buffer_size", "max_in_cpu"}:
        if not _is_at_most(0, offload[name]):
            raise InputError(f"{source}: {key}.{name} is {offload[name]!r}, expected a number, not negative")
    if not isinstance(offload.get("nvme_path"), str) or not offload["nvme_path"]:
        raise InputError(f"{source}: {key}.nvme_path is {offload.get('nvme_path')!r}, expected a folder on the NVMe disk")
    if key.endswith("optimizer") and offload.get("buffer_count", fewest_buffers(offload)) < fewest_buffers(offload):
        raise InputError(
            f"{source}: {key}.buffer_count is {offload['buffer_count']!r}, expected at least {fewest_buffers(offload)}: "
            "master, two moments and gradient of a sub-group, of the next with pipeline_read, of the last with pipeline_write"
        )


def _is_at_most(value: Any, largest: Any) -> bool:
    return all(isinstance(number, (int, float)) for number in (value, largest)) and value <= largest


def fewest_buffers(offload: Mapping[str, Any]) -> int:
    """Of "offload_optimizer" on NVMe: a sub-group in memory is four, and each way that runs beside the update needs as many."""
    return 4 * (1 + bool(offload.get("pipeline_read")) + bool(offload.get("pipeline_write")))


def _parse_block(block: Any, source: str) -> BeingVLBlock:
    known = {entry.name: entry for entry in dataclasses.fields(BeingVLBlock)}
    _check_known(block, set(known), source, "beingvl.")
    for name, entry in known.items():
        if entry.default is dataclasses.MISSING and name not in block:
            raise InputError(f"{source}: beingvl.{name} is missing")
    for name, value in block.items():
        _check_type(name, value, str(known[name].type), source)
    positive = (
        "epochs",
        "sequence_length",
        "max_steps",
        "log_every_steps",
        "loss_chunk_tokens",
        "keep_last",
        "max_skipped_steps",
    )
    for name in (*positive, "stall_timeout_seconds"):
        if block.get(name) is not None and block[name] <= 0:
            raise InputError(f"{source}: beingvl.{name} is {block[name]!r}, expected more than 0")
    for name, largest in (("warmup_ratio", 1), ("min_lr_ratio", 1), ("sequence_length", LONGEST_SEQUENCE)):
        if block.get(name, 0) > largest:
            raise InputError(f"{source}: beingvl.{name} is {block[name]!r}, expected at most {largest}")
    for name, choices in CHOICES.items():
        if block.get(name, choices[0]) not in choices:
            raise InputError(f"{source}: beingvl.{name} is {block[name]!r}, expected one of {list(choices)}")
    rules = []
    for rule in block["trainable"]:
        _check_known(rule, {entry.name for entry in dataclasses.fields(Rule)}, source, "beingvl.trainable[].")
        if not isinstance(rule.get("match"), str):
            raise InputError(f"{source}: a rule of beingvl.trainable has no 'match': {rule}")
        if not isinstance(rule.get("train", True), bool):
            raise InputError(f"{source}: train of the rule {rule['match']!r} is {rule['train']!r}, expected true or false")
        _check_number(f"{source}: lr_multiplier of the rule {rule['match']!r}", rule.get("lr_multiplier", 1))
        if rule.get("weight_decay") is not None:
            _check_number(f"{source}: weight_decay of the rule {rule['match']!r}", rule["weight_decay"])
        rules.append(Rule(**rule))
    return BeingVLBlock(**{**block, "trainable": tuple(rules)})


_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "float": ((int, float), "a number"),
    "int": ((int,), "a whole number"),
    "int | None": ((int, type(None)), "a whole number or null"),
    "bool": ((bool,), "true or false"),
    "str": ((str,), "a text"),
    "dict[str, float]": ((dict,), "an object of source -> share"),
    "tuple[Rule, ...]": ((list,), "a list of rules"),
}


def _check_type(name: str, value: Any, annotation: str, source: str) -> None:
    types, description = _TYPES[annotation]
    is_wrong_bool = isinstance(value, bool) and bool not in types
    if not isinstance(value, types) or is_wrong_bool or (isinstance(value, (int, float)) and not 0 <= value < 2**63):
        raise InputError(f"{source}: beingvl.{name} is {value!r}, expected {description}, not negative and below 2**63")


def _check_known(fields: Any, known: set[str], source: str, prefix: str) -> None:
    if not isinstance(fields, Mapping):
        raise InputError(f"{source}: {prefix.rstrip('.') or 'the file'} is {fields!r}, expected an object")
    for key in fields:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known are {', '.join(sorted(known))}"
            raise InputError(f"{source}: unknown key {prefix}{key}; {hint}")
