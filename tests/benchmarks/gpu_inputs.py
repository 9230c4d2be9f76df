"""What the benchmarks of training on a GPU run on: a model of real shape without weight files,
shards of realistic lengths.

A sample is `bos boi IMAGE eoi question sep answer eos` of random ids. An image has 720 tokens on
average, as real codes have after vBPE (docs/dev/benchmarks.md); questions and answers have
lognormal lengths, whose medians below are assumed, not measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from beingvl.artefact.files import to_json
from beingvl.data.shard_columns import Sample
from beingvl.data.shard_writer import ShardWriter
from beingvl.vocab import LAYOUT_FILE, VocabLayout
from tests.benchmarks import convert
from tests.model.small_models import LLAMA3_ROPE

SIZES = {
    **convert.SIZES,
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
    },
}
LAYOUTS = {
    "8b": VocabLayout(
        num_text=128_256, num_vq=8192, num_merges=8192, bos_id=128_000, eos_id=128_001
    ),
    "1b": VocabLayout(
        num_text=128_256, num_vq=8192, num_merges=8192, bos_id=128_000, eos_id=128_001
    ),
    "tiny": VocabLayout(num_text=1024, num_vq=128, num_merges=64, bos_id=1022, eos_id=1023),
}
IMAGE_TOKENS, QUESTION_TOKENS = (720, 120), 25  # mean and deviation; median
ANSWER_TOKENS = {
    "foundation": 60,
    "perception": 15,
    "reasoning": 120,
    "instruction": 200,
}  # medians
LONGEST_SAMPLE = 2000


def write_model(
    folder: Path, size: str, pad_to_multiple_of: int = 1, num_layers: int | None = None
) -> Path:
    """config.json and the vocabulary layout of Llama 3's shape; `RandomWeights` has the weights."""
    layout, fields = (
        LAYOUTS[size],
        SIZES[size] | ({"num_hidden_layers": num_layers} if num_layers else {}),
    )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": -(-layout.size // pad_to_multiple_of) * pad_to_multiple_of,
        "num_key_value_heads": 8,
        "head_dim": fields["hidden_size"] // fields["num_attention_heads"],
        "max_position_embeddings": 131072,
        "rope_parameters": LLAMA3_ROPE,
        "rms_norm_eps": 1e-5,
        "bos_token_id": layout.bos_id,
        "eos_token_id": layout.eos_id,
        "tie_word_embeddings": False,
        **fields,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / LAYOUT_FILE).write_text(to_json(layout.to_dict()))
    return folder


class RandomWeights(Mapping[str, torch.Tensor]):
    """A model's tensors by name, each made on the device when it is asked for: normals, ones for
    norms.

    16 GB need no disk then, and no time to read; zeros would be quicker still, but matrix products
    are faster on zeros.
    """

    def __init__(self, model_folder: Path, device: torch.device) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_folder))
        self._shapes = {
            name: tuple(parameter.shape) for name, parameter in model.named_parameters()
        }
        self._device = device

    @property
    def num_elements(self) -> int:
        return sum(int(np.prod(shape)) for shape in self._shapes.values())

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = torch.empty(self._shapes[name], dtype=torch.bfloat16, device=self._device)
        return tensor.fill_(1) if tensor.dim() == 1 else tensor.normal_(std=0.02)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def write_shards(folder: Path, layout: VocabLayout, num_samples: int) -> Path:
    random = np.random.default_rng(0)
    writer = ShardWriter(folder, layout)
    for number in range(num_samples):
        writer.add(
            _random_sample(
                str(number), list(ANSWER_TOKENS)[number % len(ANSWER_TOKENS)], layout, random
            )
        )
    writer.finish({"vocab": layout.fingerprint()}, {})
    return folder


def _random_sample(
    name: str, source: str, layout: VocabLayout, random: np.random.Generator
) -> Sample:
    image = int(np.clip(random.normal(*IMAGE_TOKENS), 256, 1024))
    question = int(np.clip(random.lognormal(np.log(QUESTION_TOKENS), 0.5), 4, 200))
    answer = int(
        np.clip(
            random.lognormal(np.log(ANSWER_TOKENS[source]), 0.7),
            1,
            LONGEST_SAMPLE - image - question - 5,
        )
    )
    ids = np.concatenate(
        [
            [layout.bos_id, layout.boi_id],
            layout.image_to_token_ids(random.integers(0, layout.num_vq + layout.num_merges, image)),
            [layout.eoi_id],
            random.integers(0, layout.num_text - 300, question),
            [layout.sep_id],
            random.integers(0, layout.num_text - 300, answer),
            [layout.eos_id],
        ]
    ).astype(np.int32)
    return Sample(name, "", source, ids, np.array([[len(ids) - answer - 1, len(ids)]], np.int32))


def rows_of(samples: list[Sample]) -> list[dict[str, Any]]:
    """What Hugging Face's Trainer trains on: `labels` are not shifted, -100 where there is no
    target.
    """
    rows = []
    for sample in samples:
        labels = np.full(len(sample.input_ids), -100)
        for start, end in sample.target_spans:
            labels[start:end] = sample.input_ids[start:end]
        rows.append({"input_ids": sample.input_ids.tolist(), "labels": labels.tolist()})
    return rows
