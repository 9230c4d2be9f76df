"""The whole line through the Python API, with the vocabulary it is for: Llama-3's own tokenizer,
8192 codes, ids beyond 16 bits in every step.
"""

import json

import numpy as np
from PIL import Image
from safetensors.torch import load_file

from beingvl import (
    BeingVL,
    VisualBPE,
    build_shards,
    convert,
    encode_images,
    evaluate,
    export,
    tokenize,
    train,
    train_vbpe,
)
from beingvl.artefact.manifest import verify_folder
from beingvl.data.arrow_shards import ShardReader
from beingvl.vocab import VocabLayout
from tests.launcher import free_port
from tests.model.small_models import write_llama3_base, write_vqgan
from tests.tiny import stage_fields

ROWS_ONLY = [{"match": "visual_rows"}, {"match": ".*", "train": False}]


def test_from_images_to_an_answer(tmp_path, monkeypatch) -> None:
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
    write_llama3_base(llama, hidden_size=16)
    (tmp_path / "stage.json").write_text(
        json.dumps(stage_fields(mixture={"foundation": 1}, trainable=ROWS_ONLY))
    )

    # a process that trains is one rank; here alone, and only as long as this test
    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": free_port()}
    for name, value in {**place, "MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu"}.items():
        monkeypatch.setenv(name, str(value))

    codes, vbpe, tokenized, shards, run = (
        tmp_path / name for name in ("vq_codes", "vbpe", "tokenized", "shards", "stage-1")
    )
    assert encode_images(images, vqgan, codes, device="cpu").counts["images"] == 8
    vocabulary = train_vbpe(codes, vbpe, num_merges=32, min_count=1)
    convert(llama, base, being_vq_path=vqgan, vbpe=vbpe)
    layout = VocabLayout.load(base)
    assert (layout.num_text, layout.first_image_id, layout.size) == (
        128256,
        128261,
        128261 + 8192 + 32,
    )
    rows = tmp_path / "data.json"
    inputs = {"vq_codes": str(codes), "vbpe_path": str(vbpe)}
    tokenize(str(rows), str(base), str(tokenized), **inputs)
    built = build_shards(str(tokenized / "data_vbpe.jsonl"), str(shards), vbpe_path=str(vbpe))
    tokenize(rows, base, tmp_path / "direct", format="arrow", **inputs)
    assert built.content_hash == verify_folder(tmp_path / "direct/data_vbpe").content_hash

    reader = ShardReader(shards)
    assert VisualBPE.load(vbpe).num_merges == vocabulary.num_merges == 32
    samples = [reader[index] for index in range(len(reader))]
    for sample, grid in zip(samples, np.load(codes / "codes.npy"), strict=True):
        image_ids = layout.token_to_image_ids(
            sample.input_ids[layout.is_image_token(sample.input_ids)]
        )
        assert (vocabulary.decode(image_ids, 4, 4) == grid).all() and grid.max() > 255
    assert max(sample.input_ids.max() for sample in samples) >= layout.size - 32

    final = train(base, shards, run, deepspeed_config=tmp_path / "stage.json")
    assert final == run / "final"
    trained = verify_folder(final)
    name = "model.embed_tokens.weight"
    before, after = (load_file(folder / "model.safetensors")[name] for folder in (base, final))
    used = np.unique(np.concatenate([sample.input_ids for sample in samples]))
    assert (before != after).any(dim=1)[used[used >= 128261]].all() and (
        before[:128256] == after[:128256]
    ).all()
    exported = export(base, tmp_path / "exported", checkpoint=str(run))
    assert exported.content_hash == trained.content_hash
    scores = evaluate(final, tmp_path / "scores", data=shards, device="cpu")
    assert scores and scores["scores"]["loss"] > 0
    model = BeingVL(final, vbpe).load_model(device="cpu")
    (answer,) = model.generate_with_vbpe(["What is it?"], [images / "0.png"], max_new_tokens=4)
    assert isinstance(answer, str)
