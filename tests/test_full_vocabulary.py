"""The whole line with the vocabulary it is for: Llama-3's own tokenizer, 8192 codes, ids beyond
16 bits in every step.
"""

import json
import shutil

import numpy as np
from PIL import Image
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from beingvl.artefact.manifest import verify_folder
from beingvl.commands import main as cli
from beingvl.data.arrow_shards import ShardReader
from beingvl.vbpe.visual_bpe import VisualBPE
from beingvl.vocab import VocabLayout
from tests import launcher
from tests.model.small_models import llama3_tokenizer_file, write_vqgan
from tests.tiny import stage_fields

ROWS_ONLY = [{"match": "visual_rows"}, {"match": ".*", "train": False}]


def test_from_images_to_an_answer(tmp_path, capsys) -> None:
    images, vqgan, llama, base = (tmp_path / name for name in ("images", "vqgan", "llama", "base"))
    images.mkdir()
    random = np.random.default_rng(0)
    rows = []
    for number in range(8):
        Image.fromarray(random.integers(0, 256, (16, 16, 3), np.uint8)).save(
            images / f"{number}.png"
        )
        turns = [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "Noise, façade 🙂."},
        ]
        rows.append(
            {
                "id": f"{number}",
                "image": f"{number}.png",
                "category": "foundation",
                "conversations": turns,
            }
        )
    (tmp_path / "data.json").write_text(json.dumps(rows))
    write_vqgan(vqgan, num_codes=8192)
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=128000,
        eos_token_id=128001,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(llama)
    shutil.copyfile(llama3_tokenizer_file(), llama / "tokenizer.model")
    (tmp_path / "stage.json").write_text(
        json.dumps(stage_fields(mixture={"foundation": 1}, trainable=ROWS_ONLY))
    )

    def beingvl(command: str, **options: object) -> None:
        assert cli.main([command, *(f"--{name}={value}" for name, value in options.items())]) == 0

    codes, vbpe, shards, run = (
        tmp_path / name for name in ("vq_codes", "vbpe", "shards", "stage-1")
    )
    beingvl("encode-images", image_path=images, vq_path=vqgan, output_path=codes, device="cpu")
    beingvl("train-vbpe", data_path=codes, output_path=vbpe, num_merges=32, min_count=1)
    beingvl("convert", llama_path=llama, being_vq_path=vqgan, vbpe=vbpe, output_path=base)
    layout = VocabLayout.load(base)
    assert (layout.num_text, layout.first_image_id, layout.size) == (
        128256,
        128261,
        128261 + 8192 + 32,
    )
    inputs = {
        "json_path": tmp_path / "data.json",
        "vq_codes": codes,
        "vbpe_path": vbpe,
        "model_path": base,
    }
    beingvl("tokenize", **inputs, output_dir=shards, format="arrow")

    reader, vocabulary = ShardReader(shards / "data_vbpe"), VisualBPE.load(vbpe)
    samples = [reader[index] for index in range(len(reader))]
    for sample, grid in zip(samples, np.load(codes / "codes.npy"), strict=True):
        image_ids = layout.token_to_image_ids(
            sample.input_ids[layout.is_image_token(sample.input_ids)]
        )
        assert (vocabulary.decode(image_ids, 4, 4) == grid).all() and grid.max() > 255
    assert max(sample.input_ids.max() for sample in samples) >= layout.size - 32

    assert launcher.run(1, tmp_path / "stage.json", base, shards / "data_vbpe", run) == 0, (
        launcher.log_of(run)
    )
    verify_folder(run / "final")
    name = "model.embed_tokens.weight"
    before, after = (
        load_file(folder / "model.safetensors")[name] for folder in (base, run / "final")
    )
    used = np.unique(np.concatenate([sample.input_ids for sample in samples]))
    assert (before != after).any(dim=1)[used[used >= 128261]].all() and (
        before[:128256] == after[:128256]
    ).all()
    capsys.readouterr()
    beingvl(
        "generate",
        model=run / "final",
        device="cpu",
        image=images / "0.png",
        prompt="What is it?",
        max_new_tokens=4,
    )
    assert capsys.readouterr().out
