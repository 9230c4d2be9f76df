"""The training guide's stage scripts, word for word, on files of a user of Being-VL-0.5: LLaVA rows
without categories, and its published JSONL; with its tokenizer and all 144,645 ids.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beingvl import BeingVL, convert, tokenize, train_vbpe
from beingvl.artefact.manifest import read_manifest, verify_folder
from beingvl.images.encode_images import encode_images
from beingvl.vbpe.train_vbpe import import_vbpe
from tests.launcher import free_port
from tests.model.small_models import write_llama3_base, write_vqgan
from tests.test_whole_line import must
from tests.upstream import artefacts

STAGES = ("pt/pretrain_data", "sft_stage2/sft_stage2_data", "sft_stage3/sft_stage3_data")
SMALL = ["--set", "train_batch_size=2", "beingvl.sequence_length=64"]  # as the data is
ROWS = [
    {
        "image": f"{number}.png",
        "conversations": [
            {"from": "human", "value": f"<image>\nIs it {number}?"},
            {"from": "gpt", "value": "yes"},
        ],
    }
    for number in range(10)
]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Pictures, a VQ-GAN, and Llama-3's vocabulary extended by the published tokenizer."""
    folder = tmp_path_factory.mktemp("guide")
    (folder / "images").mkdir()
    random = np.random.default_rng(0)
    for number in range(len(ROWS)):
        pixels = random.integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"images/{number}.png")
    write_vqgan(folder / "vq", num_codes=8192)
    llama = write_llama3_base(folder / "llama", hidden_size=16, num_layers=4)
    tokenizer = artefacts.write_tokenizer(folder / "being-tokenizer", artefacts.REAL)
    (tokenizer / "preprocessor_config.json").unlink()  # the VQ-GAN has its own
    options = {"being_tokenizer_config_path": tokenizer, "being_vq_path": folder / "vq"}
    convert(llama, folder / "models/beingvl/base", **options)
    encode_images(folder / "images", folder / "vq", folder / "codes", device="cpu")
    return folder


def write_plain(work: Path, tokenized: Path) -> Path:
    """As the guide's data steps do: `--mode pt` for stage 1, `--mode sft` for the others."""
    (work / "rows.json").write_text(json.dumps(ROWS))
    train_vbpe(work / "codes", work / "vbpe", num_merges=8, min_count=1)
    for mode, name in zip(("pt", "sft", "sft"), STAGES, strict=True):
        tokenize(
            work / "rows.json",
            work / "models/beingvl/base",
            (tokenized / name).parent,
            vq_codes=work / "codes",
            vbpe_path=work / "vbpe",
            mode=mode,
            dataset_name=Path(name).name,
        )
    return work / "vbpe"


def write_published(work: Path, tokenized: Path) -> Path:
    grids = np.load(work / "codes/codes.npy")
    for name in STAGES:
        place = tokenized / name
        artefacts.write_rows(place.parent, place.name, ROWS, grids, artefacts.REAL)
    artefacts.write_pickle(work / "vbpe.pkl", artefacts.REAL)
    import_vbpe(work / "vbpe.pkl", work / "published-vbpe", init_size=8192)
    return work / "published-vbpe"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("write", "template"), [(write_plain, "default"), (write_published, "being-vl-0.5")]
)
def test_three_stages_and_a_question(work, tmp_path, write, template) -> None:
    workspace = tmp_path
    (workspace / "models/beingvl").mkdir(parents=True)
    (workspace / "models/beingvl/base").symlink_to(work / "models/beingvl/base")
    vbpe = write(work, workspace / "data/tokenized")
    for stage in (1, 2, 3):
        variables = {"WORKSPACE": workspace, "MASTER_PORT": free_port(), "NUM_RANKS": 2}
        shown = must(["bash", f"beingvl/scripts/train-stage-{stage}.sh", 0, *SMALL], **variables)
        assert "the stage trains on all 10 samples in full" in shown
        shards = workspace / f"data/tokenized/{STAGES[stage - 1]}_vbpe_shards"
        assert read_manifest(shards).details["template"] == template
    final = workspace / "models/beingvl/stage-3/final"
    assert verify_folder(final).details["template"] == template
    model = BeingVL(final, vbpe).load_model(device="cpu")
    assert model.template == template
    (answer,) = model.generate_with_vbpe(["Is it 0?"], [work / "images/0.png"], max_new_tokens=4)
    assert isinstance(answer, str)
