"""The DeepSpeed keys that a stage may have, their allowed values, and which keys are refused, and
why.

DeepSpeed silently accepts unknown top-level keys, and reads the text "false" as false in one place
and as true in another; other wrong types fail when the model is built, or later. Some of its
defaults do silent harm, so a stage must write these keys out: gradient_clipping (1.0),
train_batch_size (must not depend on the number of ranks). Sources:
https://www.deepspeed.ai/docs/config-json/, and deepspeed/runtime/constants.py and zero/config.py of
0.19.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from beingvl.errors import InputError
from beingvl.stage.json_schema import (
    OBJECT,
    SWITCH,
    TEXT,
    Allowed,
    Schema,
    check,
    count,
    maybe,
    number,
    one_of,
    only,
    whole,
)

# limit of factors for weights or gradients: far above any use, far below float32's largest number
LARGEST_FACTOR = 1e6
FACTOR = number(0, LARGEST_FACTOR)
BETAS = Allowed(
    "two numbers from 0 to below 1",
    lambda value: (
        isinstance(value, list)
        and len(value) == 2
        and all(number(0, 1).holds(beta) and beta < 1 for beta in value)
    ),
)
NAMES = Allowed(
    "a list of names", lambda value: isinstance(value, list) and all(map(TEXT.holds, value))
)
IN_FLOAT32 = only(False, "checkpoints hold masters and moments in float32")

REFUSED_KEYS = {
    "scheduler": "the learning rate is a pure function of the step: use beingvl.schedule and "
    "beingvl.warmup_ratio",
    "gradient_accumulation_steps": "it follows from train_batch_size, the micro-batch size and "
    "the number of ranks; remove it",
    "fp16": "loss scaling makes steps depend on history: use bf16 or neither",
    "tensorboard": "metrics are beingvl's own: beingvl.tensorboard",
    "seed": "the data order's seed is beingvl.seed, and nothing else is drawn",
    "compile": "DeepSpeed's compilation is not used here; remove it",
    "data_efficiency": "the data order is beingvl's own: beingvl.mixture",
    "activation_checkpointing": "it is beingvl's own: beingvl.activation_checkpointing",
    "prescale_gradients": "ZeRO refuses it; the loss is divided by all ranks' target tokens "
    "before its gradient is taken",
    "gradient_predivide_factor": "ZeRO refuses it; the loss is divided by all ranks' target "
    "tokens before its gradient is taken",
}
REQUIRED_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "optimizer.type",
    "optimizer.params.lr",
    "optimizer.params.torch_adam",
    "gradient_clipping",
    "zero_optimization.stage",
)

# ---- zero_optimization ----

DEVICE = one_of("none", "cpu", "nvme")
FOLDER = maybe(TEXT)
OFFLOAD_KEYS: dict[str, Schema] = {
    "offload_optimizer": {
        "device": DEVICE,
        "pin_memory": SWITCH,
        "nvme_path": FOLDER,
        "buffer_count": count(),
        "pipeline_read": SWITCH,
        "pipeline_write": SWITCH,
    },
    "offload_param": {
        "device": DEVICE,
        "pin_memory": SWITCH,
        "nvme_path": FOLDER,
        "buffer_count": count(),
        "buffer_size": count(),
        "max_in_cpu": count(),
    },
}
# DeepSpeed accepts these with and without the prefix "stage3_".
STAGE3_KEYS: dict[str, Schema] = {
    "prefetch_bucket_size": count(),
    "param_persistence_threshold": count(),
    "model_persistence_threshold": count(),
    "max_live_parameters": count(),
    "max_reuse_distance": count(),
    "gather_16bit_weights_on_model_save": SWITCH,
    "use_all_reduce_for_fetch_params": SWITCH,
    "allgather_sequential": SWITCH,
    "module_granularity_threshold": only(
        0, "split vocabulary rows would be looked up while only one rank's share is there"
    ),
}
# All refusals except quantization were tried on two CPU ranks (DeepSpeed 0.19.8).
ZERO_KEYS: dict[str, Schema] = {
    **STAGE3_KEYS,
    **{f"stage3_{key}": allowed for key, allowed in STAGE3_KEYS.items()},
    **dict.fromkeys(OFFLOAD_KEYS, maybe(OBJECT)),
    "stage": Allowed(
        "one of 1, 2, 3; on one rank stage 1 is the same as stage 0", one_of(1, 2, 3).holds
    ),
    "contiguous_gradients": SWITCH,
    "reduce_scatter": SWITCH,
    "reduce_bucket_size": count(1),
    "use_multi_rank_bucket_allreduce": SWITCH,
    "allgather_partitions": SWITCH,
    "allgather_bucket_size": count(1),
    "overlap_comm": SWITCH,
    "compute_grad_norm": only(True, "the norm shows steps that are not finite"),
    "sub_group_size": count(),
    "ignore_unused_parameters": SWITCH,
    "memory_efficient_linear": SWITCH,
    "override_module_apply": SWITCH,
    "log_trace_cache_warnings": SWITCH,
    "enable_sanity_checks": SWITCH,
    "round_robin_gradients": only(
        False,
        "with it DeepSpeed reports wrong places for masters and moments, and checkpoints "
        "would be wrong",
    ),
    "zero_hpz_partition_size": only(
        1, "its second copy of the weights is not loaded, and the first loss is not a number"
    ),
    "zero_quantized_weights": only(False, "weights must pass between ranks as they are"),
    "zero_quantized_nontrainable_weights": only(
        False, "weights must pass between ranks as they are"
    ),
    "zero_quantized_gradients": only(False, "gradients must pass between ranks as they are"),
}
# Limits with weights on NVMe, where buffers are few. A prefetched weight that a step uses twice
# would get a second buffer (an assertion fails in DeepSpeed 0.19.8); one kept for reuse or for ever
# would block its buffer. Weights below 1 MB are in memory anyway.
AHEAD_KEYS = ("stage3_prefetch_bucket_size", "stage3_max_reuse_distance")
LARGEST_ON_NVME = {**dict.fromkeys(AHEAD_KEYS, 0), "stage3_param_persistence_threshold": 200_000}

# ---- all keys ----

DEEPSPEED_KEYS: dict[str, Schema] = {
    "train_batch_size": whole(1),
    "train_micro_batch_size_per_gpu": whole(1),
    "optimizer": {
        "type": one_of("Adam", "AdamW"),
        "params": {
            "lr": FACTOR,
            "betas": BETAS,
            "eps": FACTOR,
            "weight_decay": FACTOR,
            "torch_adam": only(True, "checkpoints restore the moments of torch's Adam"),
            "adam_w_mode": SWITCH,
            "fused": SWITCH,
        },
    },
    "gradient_clipping": FACTOR,
    "bf16": {
        "enabled": SWITCH,
        "immediate_grad_update": SWITCH,
        "check_grad_overflow": only(True, "weights that are not finite would be kept"),
        "bf16_master_weights_and_grads": IN_FLOAT32,
        "bf16_optimizer_states": IN_FLOAT32,
    },
    "zero_optimization": ZERO_KEYS,
    "zero_allow_untested_optimizer": SWITCH,
    "zero_force_ds_cpu_optimizer": SWITCH,
    "communication_data_type": one_of("fp32", "bf16", "fp16", None),
    "steps_per_print": count(1),  # DeepSpeed divides by it
    "wall_clock_breakdown": SWITCH,
    "memory_breakdown": SWITCH,
    "dump_state": SWITCH,
    "aio": {
        "block_size": count(),
        "queue_depth": count(),
        "intra_op_parallelism": count(),
        "single_submit": SWITCH,
        "overlap_events": SWITCH,
        "use_gds": SWITCH,
    },
    "comms_logger": {
        "enabled": SWITCH,
        "verbose": SWITCH,
        "prof_all": SWITCH,
        "prof_ops": NAMES,
        "debug": SWITCH,
    },
    "flops_profiler": {
        "enabled": SWITCH,
        "profile_step": count(),
        "module_depth": whole(-1),
        "top_modules": count(),
        "detailed": SWITCH,
        "output_file": maybe(TEXT),
    },
    "timers": {"throughput": {"enabled": SWITCH, "synchronized": SWITCH}},
}


def refuse_keys(fields: Mapping[str, Any], source: str) -> None:
    """Raises InputError that names every key a stage must not have, and every value "auto", as in
    accelerate's files.
    """
    found = [f"{key!r}: {reason}" for key, reason in REFUSED_KEYS.items() if key in fields]
    if autos := list(_autos({key: fields[key] for key in fields if key not in REFUSED_KEYS})):
        found.append(f'{", ".join(autos)}: nothing fills in "auto", write the value')
    if found:
        if "beingvl" not in fields:
            found.append('it has no block "beingvl": start from ds_configs/stage1.json')
        raise InputError(f"{source} is not a beingvl stage: {'; '.join(found)}")


def _autos(value: Any, name: str = "") -> Iterator[str]:
    """Keys whose value is "auto"."""
    if value == "auto":
        yield name
    if isinstance(value, Mapping):
        for key, inside in value.items():
            yield from _autos(inside, f"{name}.{key}" if name else key)


def check_offload(zero: Mapping[str, Any], source: str) -> None:
    """Check which offload keys of "zero_optimization" fit together. Raises InputError."""
    for key, inside in OFFLOAD_KEYS.items():
        check(zero.get(key) or {}, inside, source, f"zero_optimization.{key}")
        _check_device(zero.get(key) or {}, f"zero_optimization.{key}", zero["stage"], source)
    if (zero.get("offload_param") or {}).get("device") == "nvme":
        for name, largest in LARGEST_ON_NVME.items():
            for key in (name, name.removeprefix("stage3_")):
                if zero.get(key, 0) > largest:
                    found = f"{source}: zero_optimization.{key} is {zero[key]!r}"
                    raise InputError(
                        f"{found}, expected {largest} at most with offload_param on NVMe, "
                        "where buffers are few"
                    )


def _check_device(offload: Mapping[str, Any], key: str, stage: int, source: str) -> None:
    device, is_optimizer = offload.get("device", "none"), key.endswith("optimizer")
    if device != "none" and stage < 3 and not (device == "cpu" and is_optimizer):
        raise InputError(
            f"{source}: {key} needs a higher stage than {stage} for the device {device!r}; "
            "remove it"
        )
    if device != "nvme":
        return
    if not offload.get("nvme_path"):
        raise InputError(
            f"{source}: {key}.nvme_path is {offload.get('nvme_path')!r}, expected a folder "
            "on the NVMe disk"
        )
    fewest = fewest_buffers(offload)
    if is_optimizer and offload.get("buffer_count", fewest) < fewest:
        raise InputError(
            f"{source}: {key}.buffer_count is {offload['buffer_count']!r}, expected at least "
            f"{fewest}: master, two moments and gradient of a sub-group, of the next with "
            "pipeline_read, of the last with pipeline_write"
        )


def fewest_buffers(offload: Mapping[str, Any]) -> int:
    """A sub-group of an optimizer on NVMe takes four buffers; each pipeline adds four."""
    return 4 * (1 + bool(offload.get("pipeline_read")) + bool(offload.get("pipeline_write")))
