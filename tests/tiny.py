"""Tiny real artefacts for tests: a random Being-VL model folder and shards of random samples,
made in milliseconds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from beingvl.artefact.files import to_json
from beingvl.artefact.manifest import MANIFEST_FILE, read_manifest, write_manifest
from beingvl.data.shard_columns import Sample
from beingvl.data.shard_writer import ShardWriter
from beingvl.vbpe.vbpe_file import VBPE_FILE
from beingvl.vbpe.visual_bpe import VisualBPE
from beingvl.vocab import LAYOUT_FILE, SPECIAL_TOKENS, VocabLayout

LAYOUT = VocabLayout(num_text=258, num_vq=16, num_merges=8, bos_id=256, eos_id=257)


def write_model(
    folder: Path,
    layout: VocabLayout = LAYOUT,
    num_layers: int = 4,
    hidden_size: int = 32,
    seed: int = 0,
) -> Path:
    """A random LLaMA with the layout's vocabulary and a byte tokenizer, as a finished Being-VL
    model folder.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=layout.size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=layout.bos_id,
        eos_token_id=layout.eos_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder, layout)
    (folder / LAYOUT_FILE).write_text(to_json(layout.to_dict()))
    write_manifest(folder, "model", {"parameters": 0}, {"vocab": layout.fingerprint()})
    return folder


def write_tokenizer(folder: Path, layout: VocabLayout) -> None:
    """One id per byte, then bos and eos, then the new tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", *SPECIAL_TOKENS])
    tokenizer.add_tokens(layout.new_tokens()[len(SPECIAL_TOKENS) :])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        pad_token=SPECIAL_TOKENS[0],
    )
    wrapped.save_pretrained(folder)


def write_shards(
    folder: Path, num_samples: int = 60, layout: VocabLayout = LAYOUT, seed: int = 0
) -> Path:
    """Random samples of 5 … 40 tokens in two sources; the last third of each sample is its
    target.
    """
    random = np.random.default_rng(seed)
    writer = ShardWriter(folder, layout, rows_per_shard=32)
    for number in range(num_samples):
        length = int(random.integers(5, 40))
        writer.add(
            Sample(
                id=f"sample-{number}",
                image="",
                category=("foundation", "reasoning")[number % 3 == 0],
                input_ids=random.integers(0, layout.size, length).astype(np.int32),
                target_spans=np.array([[length - length // 3, length]], np.int32),
            )
        )
    writer.finish({"vocab": layout.fingerprint()}, {})
    return folder


def write_vbpe_inside(folder: Path, layout: VocabLayout = LAYOUT) -> VisualBPE:
    """A finished model folder gets a vBPE of three merges, the last one of three cells."""
    merges = [(0, 1, 0, 1), (2, 0, 1, 0), (layout.num_vq, 2, 1, 0)]
    vbpe = VisualBPE(layout.num_vq, merges)
    manifest = read_manifest(folder)
    (folder / MANIFEST_FILE).unlink()
    vbpe.save(folder / VBPE_FILE)
    lineage = {**manifest.lineage, "vbpe": vbpe.fingerprint()}
    write_manifest(folder, "model", manifest.counts, lineage, manifest.details)
    return vbpe


def image_row(layout: VocabLayout, vbpe: VisualBPE, random: np.random.Generator) -> np.ndarray:
    """`bos boi IMAGE eoi` and some text, int32 `[n]`; the image has 16 cells, some of them
    merged.
    """
    image = layout.image_to_token_ids(vbpe.encode(random.integers(0, 3, (4, 4))))
    text = random.integers(0, layout.num_text, random.integers(4, 9))
    return np.concatenate([[layout.bos_id, layout.boi_id], image, [layout.eoi_id], text]).astype(
        np.int32
    )


def write_image_shards(folder: Path, vbpe: VisualBPE, **details: object) -> Path:
    """Rows of one merged image, or of two, with text behind them; the last two tokens are
    targets.
    """
    random, writer = np.random.default_rng(0), ShardWriter(folder, LAYOUT)
    for number in range(60):
        rows = [image_row(LAYOUT, vbpe, random) for _ in range(1 + number % 2)]
        ids = np.concatenate(rows)
        spans = np.array([[len(ids) - 2, len(ids)]], np.int32)
        category = ("foundation", "reasoning")[number % 3 == 0]
        writer.add(Sample(f"sample-{number}", "", category, ids, spans))
    writer.finish({"vocab": LAYOUT.fingerprint(), "vbpe": vbpe.fingerprint()}, details)
    return folder


def random_samples(layout: VocabLayout, targets: Sequence[tuple[int, int]]) -> list[Sample]:
    """Samples of random ids, one per (length, where its targets begin), named by their lengths."""
    random = np.random.default_rng(0)
    samples = []
    for length, start in targets:
        ids = random.integers(0, layout.size, length).astype(np.int32)
        samples.append(Sample(str(length), "", "a", ids, np.array([[start, length]], np.int32)))
    return samples


def write_inputs(folder: Path, **stages: dict) -> Path:
    """What a training run needs: `base/`, `shards/`, and one JSON file per keyword, name -> stage
    fields.
    """
    write_model(folder / "base")
    write_shards(folder / "shards")
    for name, fields in stages.items():
        (folder / f"{name}.json").write_text(json.dumps(fields))
    return folder


def stage_fields(**block: object) -> dict:
    """A stage JSON for two CPU ranks: ZeRO-3, fp32, everything trained, 4 sequences per step.

    Adam divides by |gradient| + eps: with an eps of 1e-8 a gradient that is rounding alone becomes
    a step of the learning rate, and at this one runs that agree to 1e-7 in every gradient would
    differ by 5e-5 in losses.
    """
    return {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": 1e-2,
                "betas": [0.9, 0.95],
                "eps": 1e-6,
                "weight_decay": 0.1,
                "torch_adam": True,
            },
        },
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 3},
        "beingvl": {
            "epochs": 1,
            "sequence_length": 64,
            "mixture": {"foundation": 0.7, "reasoning": 0.3},
            "trainable": [{"match": ".*"}],
            "checkpoint_every_steps": 3,
            "tensorboard": False,
            **block,
        },
    }
