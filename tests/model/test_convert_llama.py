"""The converter: every layout and family, old rows bit-identical, stock loading, refusals that
leave nothing half-written.
"""

import base64
import errno
import gc
import hashlib
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from beingvl.artefact import owner
from beingvl.artefact.hashes import hash_file
from beingvl.artefact.manifest import read_manifest, verify_folder, write_manifest
from beingvl.images.vqgan import VQGAN
from beingvl.model import convert_llama, target_folder
from beingvl.model.base_model import BaseModel
from beingvl.model.new_rows import VisualVocabulary, make_rows
from beingvl.model.weight_files import WeightFolder
from beingvl.vbpe.published import LegacyVisualBPE
from beingvl.vbpe.visual_bpe import VisualBPE
from beingvl.vocab import LAYOUT_FILE, VocabLayout
from tests.command import argv, beingvl
from tests.damage import list_anew
from tests.model.small_models import (
    LLAMA3_ROPE,
    NUM_CODES,
    TEXTS,
    make_tokenizer,
    write_base_model,
    write_llama3_base,
    write_sentencepiece_base,
    write_vbpe,
    write_vqgan,
)
from tests.programs import run_program

FAMILIES = ["llama", "llama3", "tied", "mistral", "qwen2", "gemma2", "phi", "gpt2"]
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def vq(tmp_path_factory):
    return write_vqgan(tmp_path_factory.mktemp("vq") / "vq")


@pytest.fixture(scope="module")
def vbpe_file(tmp_path_factory, vq):
    path = tmp_path_factory.mktemp("vbpe") / "vbpe.json"
    write_vbpe(path, vq)
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_base_model(
        tmp_path_factory.mktemp("llama") / "llama", "llama3", "sharded", torch.bfloat16
    )


def convert(llama_path: Path, output_path: Path, **options: object) -> int:
    return beingvl("convert", llama_path=llama_path, output_path=output_path, **options)


@pytest.fixture(autouse=True)
def few_codes(request, monkeypatch):
    """Without --being_vq_path the layout has 8192 codes; the tests make do with 16, unless they
    ask for `full_size`.
    """
    if "full_size" not in request.fixturenames:
        monkeypatch.setattr(convert_llama, "DEFAULT_CODES", NUM_CODES)


@pytest.fixture
def full_size():
    """Leaves the default numbers of codes and merges as they are."""


def refused(capsys, message: str, *paths: Path, **options: object) -> None:
    """The command ends with exit code 2 and one line that contains `message`."""
    capsys.readouterr()
    assert convert(*paths, **options) == 2
    error = capsys.readouterr().err
    assert message in error, error


def snapshot(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hash_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def text_logits(
    folder: Path, num_text: int, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        return [
            model(torch.tensor([tokenizer(text)["input_ids"]])).logits[..., :num_text]
            for text in TEXTS[:3]
        ]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_its_text_logits_bit_identical(tmp_path, family, vq):
    base = write_base_model(tmp_path / "llama", family)
    before = snapshot(base)
    assert convert(base, tmp_path / "base", being_vq_path=vq, num_merges=8) == 0
    assert snapshot(base) == before
    layout = VocabLayout.load(tmp_path / "base")
    assert (
        layout.num_text == (320 if family == "qwen2" else 300)
        and layout.size == layout.num_text + 5 + NUM_CODES + 8
    )
    for ours, theirs in zip(
        text_logits(tmp_path / "base", layout.num_text),
        text_logits(base, layout.num_text),
        strict=True,
    ):
        assert torch.equal(ours, theirs)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert model.config.vocab_size == layout.size and not model.config.tie_word_embeddings
    assert (
        model.get_input_embeddings().weight.data_ptr()
        != model.get_output_embeddings().weight.data_ptr()
    )
    assert len(AutoTokenizer.from_pretrained(tmp_path / "base")) == layout.size


@pytest.mark.parametrize("weights_layout", ["single", "sharded", "bin", "sharded_bin"])
@pytest.mark.parametrize("family", ["llama", "tied"])
def test_every_weight_layout_gives_the_same_tensors(tmp_path, family, weights_layout):
    base = write_base_model(tmp_path / "llama", family, weights_layout)
    reference = write_base_model(tmp_path / "reference", family)
    for source, target in ((base, tmp_path / "base"), (reference, tmp_path / "expected")):
        assert convert(source, target, num_merges=0) == 0
    ours, theirs = WeightFolder(tmp_path / "base"), WeightFolder(tmp_path / "expected")
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not list((tmp_path / "base").glob("*.bin*"))


def test_old_rows_new_rows_and_everything_around_them(tmp_path, llama, vq, vbpe_file, capsys):
    (llama / "LICENSE.txt").write_text("the base model's licence")
    options = {"being_vq_path": vq, "vbpe": vbpe_file, "verify_loading": True}
    assert convert(llama, tmp_path / "base", **options) == 0
    shown = capsys.readouterr().out
    assert (
        "DIFFERENT" not in shown
        and "text logits                equal" in shown
        and "vBPE tokens and back" in shown
    )

    base = tmp_path / "base"
    layout = VocabLayout.load(base)
    assert layout == VocabLayout(300, NUM_CODES, 3, 298, 299)
    ours, theirs = WeightFolder(base), WeightFolder(llama)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert ours[name].dtype == torch.bfloat16 and torch.equal(ours[name][:300], theirs[name])
        assert ours[name][300:].float().std().item() == pytest.approx((2 / 32) ** 0.5, rel=0.1)
    assert not torch.equal(ours["model.embed_tokens.weight"][300:], ours["lm_head.weight"][300:])

    config = json.loads((base / "config.json").read_text())
    expected = json.loads((llama / "config.json").read_text()) | {
        "vocab_size": layout.size,
        "tie_word_embeddings": False,
        "pad_token_id": layout.pad_id,
    }
    assert config == expected and config["rope_parameters"] == LLAMA3_ROPE
    generation = json.loads((base / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"], generation["pad_token_id"]) == (
        298,
        299,
        300,
    )

    manifest = read_manifest(base, "model")
    vqgan = VQGAN.load(base / "vqgan")
    assert (
        manifest.lineage["vocab"] == layout.fingerprint()
        and manifest.lineage["vqgan"] == vqgan.fingerprint()
    )
    assert set(manifest.lineage) == {"vocab", "vqgan", "vbpe"} and vqgan.has_decoder
    assert manifest.counts == {"text_rows": 300, "new_rows": layout.num_visual, "rows": layout.size}
    verify_folder(base)
    verify_folder(base / "vqgan")
    assert (base / "LICENSE.txt").read_text() == "the base model's licence"
    (llama / "LICENSE.txt").unlink()


def test_shards_without_embedding_or_head_are_links_unless_copies_are_asked_for(tmp_path, llama):
    for option, count in (("link", 1), ("no_link", 0)):
        target = tmp_path / option
        assert convert(llama, target, num_merges=0, **{option: True}) == 0
        linked = [
            path for path in target.glob("*.safetensors") if (llama / path.name).samefile(path)
        ]
        changed = WeightFolder(llama)
        rewritten = {
            changed.tensors[name].file.name
            for name in ("model.embed_tokens.weight", "lm_head.weight")
        }
        assert {path.name for path in linked} == (
            set(changed.files) - rewritten if count else set()
        )


def new_row_bytes(folder: Path) -> bytes:
    weights = WeightFolder(folder)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    return b"".join(
        weights[name][300:].contiguous().view(torch.uint8).numpy().tobytes() for name in names
    )


def test_new_rows_are_the_same_bytes_on_every_machine(tmp_path, llama):
    for dtype, expected in (
        ("bfloat16", "0ec54af11d2137f3"),
        ("float32", "23f7bbb1037a1560"),
    ):
        target = tmp_path / dtype
        assert convert(llama, target, num_merges=50, torch_dtype=dtype) == 0
        assert hashlib.sha256(new_row_bytes(target)).hexdigest()[:16] == expected
    assert convert(llama, tmp_path / "other", num_merges=50, seed=1) == 0
    assert new_row_bytes(tmp_path / "other") != new_row_bytes(tmp_path / "bfloat16")


@pytest.mark.parametrize("method", ["mean", "mean_cov", "codebook", "zero"])
def test_init_reaches_the_rows_on_disk(tmp_path, llama, vq, vbpe_file, method):
    options = {"being_vq_path": vq, "vbpe": vbpe_file, "init": method, "torch_dtype": "float32"}
    assert convert(llama, tmp_path / "base", **options) == 0
    source = WeightFolder(llama)
    visual = VisualVocabulary(
        VQGAN.load(vq).codebook,
        [VisualBPE.load(vbpe_file).cells(NUM_CODES + rank)[2] for rank in range(3)],
    )
    for stream, name in enumerate(["model.embed_tokens.weight", "lm_head.weight"]):
        expected = np.concatenate(
            list(
                make_rows(
                    method, source[name], VocabLayout.load(tmp_path / "base"), 0, stream, visual
                )
            )
        )
        assert torch.equal(
            WeightFolder(tmp_path / "base")[name][300:], torch.from_numpy(expected).float()
        )


def test_a_legacy_vbpe_converts_too(tmp_path, llama, vq, capsys):
    LegacyVisualBPE(NUM_CODES, np.array([[1, 2], [16, 3]])).save(tmp_path / "vbpe.json")
    options = {"being_vq_path": vq, "vbpe": tmp_path / "vbpe.json", "init": "codebook"}
    assert convert(llama, tmp_path / "base", **options, verify_loading=True) == 0
    shown = capsys.readouterr().out
    assert "vBPE tokens" in shown and "and back" not in shown
    assert VocabLayout.load(tmp_path / "base").num_merges == 2


def test_torch_dtype_casts_every_tensor(tmp_path, llama):
    assert convert(llama, tmp_path / "base", num_merges=0, torch_dtype="float32") == 0
    ours, theirs = WeightFolder(tmp_path / "base"), WeightFolder(llama)
    for name in theirs:
        assert ours[name].dtype == torch.float32
        assert torch.equal(ours[name][: len(theirs[name])], theirs[name].float())
    assert json.loads((tmp_path / "base" / "config.json").read_text())["dtype"] == "float32"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "base").dtype == torch.float32


def test_pad_vocab_multiple_adds_zero_rows_behind_the_layout(tmp_path, llama):
    target = tmp_path / "base"
    options = {"num_merges": 0, "pad_vocab_multiple": 64, "verify_loading": True}
    assert convert(llama, target, **options) == 0
    size = VocabLayout.load(target).size
    weights = WeightFolder(target)
    rows = -(-size // 64) * 64
    assert (
        weights.shape("lm_head.weight")[0]
        == json.loads((target / "config.json").read_text())["vocab_size"]
        == rows
    )
    assert weights["lm_head.weight"][size:].count_nonzero() == 0 and rows > size


@pytest.mark.parametrize(
    "how",
    [
        {"num_merges": 40},
        {"extended_vocab_size": 361, "vocab_size": 300},  # all ids
        {"extended_vocab_size": 61},  # new ids
    ],
)
def test_the_number_of_merges(tmp_path, llama, vq, how):
    assert convert(llama, tmp_path / "base", being_vq_path=vq, **how) == 0
    assert VocabLayout.load(tmp_path / "base").num_merges == 40


def test_default_sizes_without_vqgan_and_vbpe(tmp_path, llama, full_size):
    assert convert(llama, tmp_path / "base") == 0
    assert VocabLayout.load(tmp_path / "base").num_visual == 16389


# ---- tokenizers ----


def test_the_real_llama3_tokenizer(tmp_path, full_size):
    """Section 3 of the design: `What is` is 3923 374, new ids 128256 … 144644, whatever kind of
    file the tokenizer comes in.
    """
    base = write_llama3_base(tmp_path / "llama", hidden_size=8, dtype=torch.bfloat16)
    assert convert(base, tmp_path / "base", verify_loading=True) == 0

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    layout = VocabLayout.load(tmp_path / "base")
    assert layout == VocabLayout(128256, 8192, 8192, 128000, 128001) and len(tokenizer) == 144645
    assert tokenizer("What is")["input_ids"] == [128000, 3923, 374]
    assert tokenizer.convert_tokens_to_ids(layout.new_tokens()) == list(range(128256, 144645))
    assert tokenizer.convert_ids_to_tokens([128256, 128261, 128271, 144644]) == [
        "<pad>",
        "IMGIMGAAAAAAZ",
        "IMGIMGAAAABAZ",
        "<vbpe08191>",
    ]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        128000,
        128001,
        128256,
    )
    for text in ("I'm 12345 — naïve  façade\n\n\tif x:", "日本語のテキスト 🙂"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    generation = json.loads((tmp_path / "base" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [128001, 128008, 128009]
    assert tokenizer("<image>hi IMGIMGAAAAAAZ")["input_ids"][1:3] == [128259, 6151]

    # the converted folder's tokenizer may be given to a base without one
    (base / "tokenizer.model").unlink()
    given = {"being_tokenizer_config_path": tmp_path / "base"}
    assert convert(base, tmp_path / "again", **given) == 0
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again.get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("bare", [False, True])
def test_a_sentencepiece_tokenizer(tmp_path, bare):
    import sentencepiece

    base = write_sentencepiece_base(tmp_path / "llama")
    if not bare:
        (base / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "LlamaTokenizer", "add_bos_token": True})
        )
    assert convert(base, tmp_path / "base", num_merges=4, verify_loading=True) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    reference = sentencepiece.SentencePieceProcessor(str(base / "tokenizer.model"))
    for text in TEXTS[:3]:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == reference.encode(text)
        assert tokenizer(text)["input_ids"] == [1, *reference.encode(text)]
    settings = json.loads((tmp_path / "base" / "tokenizer_config.json").read_text())
    assert (
        settings["tokenizer_class"] == "PreTrainedTokenizerFast"
        and "extra_special_tokens" not in settings
    )
    layout = VocabLayout.load(tmp_path / "base")
    assert (layout.bos_id, layout.eos_id) == (1, 2)
    assert tokenizer.convert_tokens_to_ids(layout.new_tokens()) == list(range(300, layout.size))


@pytest.mark.parametrize("package", ["sentencepiece", "google.protobuf"])
def test_a_sentencepiece_tokenizer_says_what_to_install(tmp_path, package, monkeypatch, capsys):
    base = write_base_model(tmp_path / "llama")
    (base / "tokenizer.json").unlink()
    (base / "tokenizer.model").write_bytes(b"\x0a\x0esentencepiece")
    monkeypatch.setitem(sys.modules, package, None)
    message = "download it again (a sentencepiece file needs `pip install sentencepiece protobuf`)"
    refused(capsys, message, base, tmp_path / "never")


def test_a_given_tokenizer_without_merges_gets_them(tmp_path, llama, vq):
    assert convert(llama, tmp_path / "codes", being_vq_path=vq, num_merges=0) == 0
    (tmp_path / "codes" / LAYOUT_FILE).unlink()
    list_anew(tmp_path / "codes")
    given = {"being_tokenizer_config_path": tmp_path / "codes" / "tokenizer_config.json"}
    assert convert(llama, tmp_path / "base", being_vq_path=vq, num_merges=8, **given) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    layout = VocabLayout.load(tmp_path / "base")
    assert tokenizer.convert_tokens_to_ids(layout.new_tokens()) == list(range(300, layout.size))


def test_a_given_tokenizer_must_be_the_layouts(tmp_path, llama, vq, capsys):
    assert convert(llama, tmp_path / "base", being_vq_path=vq, num_merges=8) == 0
    given = tmp_path / "given"
    given.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tmp_path / "base" / name, given / name)
    options = {"being_vq_path": vq, "being_tokenizer_config_path": given}
    assert convert(llama, tmp_path / "fits", **options, num_merges=8) == 0
    refuses = partial(refused, capsys, llama_path=llama, output_path=tmp_path / "never", **options)
    refuses("token id 329 is None", num_merges=9)

    fields = json.loads((given / "tokenizer.json").read_text())
    next(token for token in fields["added_tokens"] if token["id"] == 307)["content"] = "IMGIMGWRONG"
    (given / "tokenizer.json").write_text(json.dumps(fields))
    refuses("token id 307 is 'IMGIMGWRONG', the layout", num_merges=8)

    shutil.copyfile(tmp_path / "base" / "tokenizer.json", given / "tokenizer.json")
    text = (given / "tokenizer.json").read_text()
    (given / "tokenizer.json").write_text(text.replace('"<|end|>"', '"<|other|>"'))
    refuses("token id 299 is '<|other|>', the base model's tokenizer says '<|end|>'", num_merges=8)

    shutil.copyfile(tmp_path / "base" / "tokenizer.json", given / "tokenizer.json")
    (given / LAYOUT_FILE).write_text(json.dumps(VocabLayout(300, NUM_CODES, 7, 298, 299).to_dict()))
    refuses("'num_merges': 7", num_merges=8)
    (given / LAYOUT_FILE).unlink()
    (given / "tokenizer.json").unlink()
    refuses("has no tokenizer")
    assert not (tmp_path / "never").exists()


# ---- bad input ----


def test_refusals_leave_no_target(tmp_path, llama, vq, vbpe_file, capsys):
    target = tmp_path / "never"
    refused(capsys, "--llama_path", tmp_path / "missing", target)
    refused(capsys, "has 300 text ids", llama, target, vocab_size=128256)
    refused(capsys, "already make 321 (21 new ones)", llama, target, extended_vocab_size=310)
    refused(capsys, "already make 321 (21 new ones)", llama, target, extended_vocab_size=20)
    refused(capsys, "contradictory", llama, target, vbpe=vbpe_file, num_merges=8)
    refused(capsys, "--pad_vocab_multiple is 0", llama, target, pad_vocab_multiple=0)
    refused(capsys, "--seed is -1", llama, target, seed=-1)
    refused(capsys, "needs --vqgan", llama, target, init="codebook")
    refused(capsys, "needs --vbpe", llama, target, being_vq_path=vq, init="codebook")
    other = write_vqgan(tmp_path / "other_vq", seed=1)
    refused(capsys, "different vqgan", llama, target, being_vq_path=other, vbpe=vbpe_file)
    assert not target.exists()


def test_a_vbpe_for_another_number_of_codes_is_refused(tmp_path, llama, vq, capsys):
    changed = tmp_path / "vbpe.json"
    VisualBPE(15, np.zeros((0, 4), np.int32)).save(changed)
    never = tmp_path / "never"
    refused(capsys, "is for 15 codes", llama, never, being_vq_path=vq, vbpe=changed)


def test_targets_that_would_harm_are_refused(tmp_path, capsys):
    base = write_base_model(tmp_path / "llama")
    before = snapshot(base)
    for target in (base, base / "inside", tmp_path, base / ".." / "llama"):
        refused(capsys, "are inside each other", base, target, overwrite=True)
    (tmp_path / "blobs").mkdir()
    (base / "model.safetensors").rename(tmp_path / "blobs" / "model.safetensors")
    (base / "model.safetensors").symlink_to("../blobs/model.safetensors")
    refused(capsys, "are inside each other", base, tmp_path / "blobs", overwrite=True)
    assert snapshot(base) == before
    (tmp_path / "file").write_text("mine")
    refused(capsys, "is a file", base, tmp_path / "file", num_merges=0, overwrite=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for overwrite in (False, True):
        assert convert(base, tmp_path / "full", num_merges=0, overwrite=overwrite) == 2
        shown = capsys.readouterr()
        assert "holds files that beingvl did not write" in shown.err
        assert not shown.out  # before anything is read or announced
        assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    assert snapshot(base) == before
    for _ in range(2):
        assert convert(base, tmp_path / "new", num_merges=0, overwrite=True) == 0
        assert "mine.txt" not in read_manifest(tmp_path / "new").files
        (tmp_path / "new" / "mine.txt").write_text("mine")
    assert convert(base, tmp_path / "new", num_merges=0, overwrite=True) == 0
    assert (tmp_path / "new" / "mine.txt").read_text() == "mine"
    (tmp_path / "codes").mkdir()
    (tmp_path / "codes" / "codes.npy").write_bytes(b"days of work")
    write_manifest(tmp_path / "codes", "vq_codes", {}, {})
    codes = snapshot(tmp_path / "codes")
    refused(capsys, "holds 'vq_codes'", base, tmp_path / "codes", num_merges=0, overwrite=True)
    assert snapshot(tmp_path / "codes") == codes


def test_a_finished_target_is_reused_by_the_same_request_and_refused_to_others(
    tmp_path, llama, capsys
):
    request = {"llama_path": llama, "num_merges": 0, "output_path": tmp_path / "base"}
    assert convert(**request) == 0
    before = (tmp_path / "base" / "manifest.json").stat().st_mtime_ns
    assert convert(**request) == 0
    assert (tmp_path / "base" / "manifest.json").stat().st_mtime_ns == before
    refused(capsys, "different seed", **request, seed=5)
    assert convert(**request, seed=5, overwrite=True) == 0
    verify_folder(tmp_path / "base")


@pytest.mark.parametrize(
    "changed", ["generation config", "tokenizer config", "weight", "given tokenizer", "vq decoder"]
)
def test_a_changed_input_is_not_the_same_request(tmp_path, vq, changed, capsys):
    base, own_vq = write_base_model(tmp_path / "llama"), tmp_path / "vq"
    shutil.copytree(vq, own_vq)
    request = {"llama_path": base, "being_vq_path": own_vq, "num_merges": 0}
    if changed == "given tokenizer":
        assert convert(**request, output_path=tmp_path / "given") == 0
        request |= {"being_tokenizer_config_path": tmp_path / "given"}
    request |= {"output_path": tmp_path / "base"}
    assert convert(**request) == 0
    if changed in ("weight", "vq decoder"):
        path = (base if changed == "weight" else own_vq) / "model.safetensors"
        tensors = load_file(path)
        name = next(
            name
            for name in tensors
            if name.startswith("decoder.") or name.endswith("q_proj.weight")
        )
        tensors[name].view(-1)[-1] += 1
        save_file(tensors, path, metadata={"format": "pt"})
    else:
        folder = tmp_path / "given" if changed == "given tokenizer" else base
        path = folder / (
            "generation_config.json" if changed == "generation config" else "tokenizer_config.json"
        )
        path.write_text(json.dumps(json.loads(path.read_text()) | {"top_k": 7}))
        list_anew(folder)
    list_anew(own_vq)
    named = {"given tokenizer": "tokenizer", "vq decoder": "vqgan"}.get(changed, "llama")
    refused(capsys, f"is finished, but with different {named}", **request)
    assert convert(**request, overwrite=True) == 0


def test_older_names_below_the_embedding_are_left_to_transformers(tmp_path):
    base = write_base_model(tmp_path / "llama")
    tensors = load_file(base / "model.safetensors")
    renamed = {
        name.replace("model.layers", "model.blocks").replace("model.norm", "model.ln"): tensors[
            name
        ]
        for name in tensors
    }
    save_file(renamed, base / "model.safetensors", metadata={"format": "pt"})
    assert BaseModel.open(base).num_text == 300


def test_an_index_that_lists_half_of_the_shards_is_refused(tmp_path, capsys):
    base = write_base_model(tmp_path / "llama", layout="sharded")
    path = base / "model.safetensors.index.json"
    fields = json.loads(path.read_text())
    kept = {fields["weight_map"][name] for name in ("model.embed_tokens.weight", "lm_head.weight")}
    fields["weight_map"] = {
        name: file for name, file in fields["weight_map"].items() if file in kept
    }
    path.write_text(json.dumps(fields))
    refused(capsys, "says 3 layers, the weights are 2 tensors", base, tmp_path / "never")


def test_a_full_disk_under_the_tokenizer_is_one_sentence(tmp_path, llama, monkeypatch, capsys):
    def fail(*_: object, **__: object) -> None:
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", fail)
    request = {"llama_path": llama, "num_merges": 0, "output_path": tmp_path / "base"}
    refused(
        capsys,
        f"{os.strerror(errno.ENOSPC)} ({tmp_path / 'base' / 'tokenizer.json'}); "
        "nothing finished is lost",
        **request,
    )
    monkeypatch.undo()
    monkeypatch.setattr(convert_llama, "DEFAULT_CODES", NUM_CODES)
    assert convert(**request) == 0


def test_a_folder_named_like_a_licence_is_left_alone(tmp_path):
    base = write_base_model(tmp_path / "llama")
    (base / "LICENSES").mkdir()
    assert convert(base, tmp_path / "base", num_merges=0) == 0


def test_what_was_not_checked_is_said(tmp_path, llama, capsys):
    request = {"llama_path": llama, "num_merges": 0, "output_path": tmp_path / "base"}
    assert convert(**request, verify_loading=True) == 0
    shown = capsys.readouterr().out
    assert "in files linked to the base's" in shown
    assert "image codes                -          not checked: there is no VQ-GAN" in shown


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no config", "has no config.json"),
        ("config is no JSON", "is not valid JSON"),
        ("config is a list", "expected a JSON object"),
        ("unknown architecture", "not a causal language model that transformers knows"),
        ("vocab_size", "the config and the weights are not of the same model"),
        ("truncated shard", "was truncated"),
        ("untied without head", "the weights have no 'lm_head.weight'"),
        ("no tokenizer", "has no tokenizer"),
        ("broken tokenizer", "cannot be read as a tokenizer"),
        ("longer tokenizer", "but the embedding has 300 rows"),
        ("no eos", "has no eos_token_id"),
        ("hidden_size", "the config and the weights are not of the same model"),
        ("intermediate_size", "mlp.gate_proj.weight' is ["),
        ("one layer more", "the weights have no 'model.layers.3.self_attn.q_proj.weight'"),
        ("most layers missing", "the weights have no 'model.layers.3.self_attn.q_proj.weight'"),
        (
            "other begin token",
            "the tokenizer's bos_token_id is 298, config.json and generation_config.json say 5",
        ),
        ("shorter tokenizer", "the tokenizer has 264 tokens, the embedding 300 rows"),
        ("truncated tiktoken", "has 20 byte-pair ranks, which make 276 tokens"),
    ],
)
def test_a_damaged_base_is_named_and_nothing_is_written(tmp_path, damage, message, capsys):
    base = write_base_model(
        tmp_path / "llama", "tied" if damage == "untied without head" else "llama"
    )
    config = json.loads((base / "config.json").read_text())
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    if damage == "no config":
        (base / "config.json").unlink()
    elif damage == "config is no JSON":
        (base / "config.json").write_text("{")
    elif damage == "config is a list":
        (base / "config.json").write_text("[]")
    elif damage == "truncated shard":
        os.truncate(base / "model.safetensors", 3000)
    elif damage == "no tokenizer":
        (base / "tokenizer.json").unlink()
    elif damage == "truncated tiktoken":
        (base / "tokenizer.json").unlink()
        lines = [f"{base64.b64encode(bytes([rank])).decode()} {rank}\n" for rank in range(20)]
        (base / "tokenizer.model").write_text("".join(lines))
    elif damage == "broken tokenizer":
        (base / "tokenizer.json").write_text('{"version": "1.0"')
    else:
        changes = {
            "unknown architecture": {"model_type": "blip-9"},
            "vocab_size": {"vocab_size": 301},
            "hidden_size": {"hidden_size": 64},
            "intermediate_size": {"intermediate_size": 40},
            "one layer more": {"num_hidden_layers": 4},
            "most layers missing": {"num_hidden_layers": 9},
            "other begin token": {"bos_token_id": 5},
            "shorter tokenizer": {"bos_token_id": None, "eos_token_id": None},
            "untied without head": {"tie_word_embeddings": False},
            "no eos": {"eos_token_id": None},
        }
        (base / "config.json").write_text(json.dumps(config | changes.get(damage, {})))
        if damage in ("other begin token", "shorter tokenizer"):
            (base / "generation_config.json").unlink()
        extra = {
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        if damage == "longer tokenizer":
            tokenizer["added_tokens"].append({"id": 300, "content": "<extra>", **extra})
        elif damage == "no eos":
            settings = json.loads((base / "tokenizer_config.json").read_text())
            settings.pop("eos_token")
            (base / "tokenizer_config.json").write_text(json.dumps(settings))
        (base / "tokenizer.json").write_text(json.dumps(tokenizer))
        if damage == "shorter tokenizer":
            make_tokenizer(264).save_pretrained(base)
    refused(capsys, message, base, tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_the_disk_is_checked_before_writing(tmp_path, llama, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    message = "MB are to be written, but the disk has 0.0 MB free"
    refused(capsys, message, llama, tmp_path / "never")
    assert not (tmp_path / "never").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=12_000_000))
    assert convert(llama, tmp_path / "small") == 0


def test_a_conversion_leaves_the_collector_as_it_was(tmp_path, llama):
    before = gc.get_threshold()
    assert convert(tmp_path, tmp_path / "base") == 2  # each inside the other
    assert convert(llama, tmp_path / "base", num_merges=0) == 0
    assert gc.get_threshold() == before


def test_killed_half_way_it_is_incomplete_and_the_same_command_starts_over(
    tmp_path, llama, vq, vbpe_file
):
    target = tmp_path / "base"
    options = {"being_vq_path": vq, "vbpe": vbpe_file}
    words = argv("convert", llama_path=llama, output_path=target, **options)
    killed = run_program("die_in_conversion", *words)
    assert killed.returncode == 9
    assert list(target.glob("*.safetensors")) and not (target / "manifest.json").exists()
    assert convert(llama, target, **options, verify_loading=True) == 0
    verify_folder(target)
    assert not list(target.glob("*.tmp"))


def interrupt(monkeypatch, module, name: str, *, after: bool = False, **request: object) -> None:
    """Run the command and end it as Ctrl-C does, when it calls `module.name` (or behind that
    call).
    """
    original = getattr(module, name)

    def stop(*args, **options):
        if after:
            original(*args, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, name, stop)
        assert convert(**request) == 130


def test_an_interrupted_run_is_not_mixed_with_another_request(
    tmp_path, llama, vq, vbpe_file, monkeypatch
):
    target = tmp_path / "base"
    request = {"llama_path": llama, "output_path": target}
    interrupt(monkeypatch, convert_llama, "start_target", **request)
    assert not target.exists()
    visual = {"being_vq_path": vq, "vbpe": vbpe_file}
    interrupt(monkeypatch, target_folder, "write_manifest", **request, **visual)
    (target / "chat_template.old.jinja").write_text("of another model")
    assert convert(**request, num_merges=0) == 0
    verify_folder(target)
    left = {path.name for path in target.iterdir()}
    assert not left & {"vqgan", "vbpe.json", "chat_template.old.jinja", ".unfinished.tmp"}


def test_overwriting_leaves_nothing_of_the_older_base(tmp_path, llama, vq):
    target = tmp_path / "base"
    request = {"llama_path": llama, "num_merges": 0, "output_path": target}
    assert (
        convert(**request, being_vq_path=vq) == 0 and (target / "vqgan" / "manifest.json").is_file()
    )
    assert convert(**request, overwrite=True) == 0
    assert not (target / "vqgan").exists()


def test_killed_around_the_marker_the_same_command_goes_on(tmp_path, llama, monkeypatch):
    target = tmp_path / "base"
    request = {"llama_path": llama, "num_merges": 0, "output_path": target}
    assert convert(**request) == 0
    before = new_row_bytes(target)
    # Killed when the older base is no longer finished, but its files are there.
    changed = {**request, "seed": 5}
    interrupt(monkeypatch, owner, "start_folder", **changed, overwrite=True)
    (target / "manifest.json").unlink()
    assert (target / "model.safetensors.index.json").is_file()
    assert convert(**changed) == 0
    assert new_row_bytes(target) != before and not list(target.glob("*.tmp"))
    verify_folder(target)


@pytest.mark.parametrize(
    "what", ["text row", "layer", "name", "new row", "tokenizer", "eos", "vqgan", "vq decoder"]
)
def test_verify_loading_finds_a_difference(tmp_path, vq, what, capsys):
    base = write_base_model(tmp_path / "llama")
    request = {"llama_path": base, "output_path": tmp_path / "base"}
    request |= {"being_vq_path": vq, "num_merges": 0}
    assert convert(**request) == 0
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    if what == "text row":
        tensors["lm_head.weight"][7, 3] += 1
    elif what == "layer":
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    elif what == "name":
        tensors["model.extra"] = torch.zeros(1)
    elif what == "new row":
        tensors["lm_head.weight"][-1, 0] = torch.nan
    elif what == "tokenizer":
        text = (tmp_path / "base" / "tokenizer.json").read_text()
        (tmp_path / "base" / "tokenizer.json").write_text(text.replace("<eoss>", "<eosx>"))
    elif what == "eos":
        (tmp_path / "base" / "generation_config.json").write_text('{"eos_token_id": 3}')
    elif what == "vqgan":
        shutil.rmtree(tmp_path / "base" / "vqgan")
        write_vqgan(tmp_path / "base" / "vqgan", seed=1)
    elif what == "vq decoder":
        path = tmp_path / "base" / "vqgan" / "model.safetensors"
        tensors = load_file(path)
        tensors[next(name for name in tensors if name.startswith("decoder."))].view(-1)[0] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    assert convert(**request, verify_loading=True) == 1
    rows = [line for line in capsys.readouterr().out.splitlines() if " DIFFERENT " in line]
    named = {
        "text row": ["files", "rows of text ids", "text logits"],
        "layer": ["files", "tensors", "text logits"],
        "name": ["files", "tensors"],
        "new row": ["files", "new rows"],
        "tokenizer": ["files", "tokenizer"],
        "eos": ["files", "generation config"],
        "vqgan": ["files", "image codes"],
        "vq decoder": ["files", "image codes"],
    }[what]
    assert len(rows) == len(named) and all(
        row.startswith(name) for row, name in zip(rows, named, strict=True)
    ), rows


# ---- the guide's command ----


def test_the_guides_command_word_for_word(tmp_path, llama, vq, vbpe_file):
    assert convert(llama, tmp_path / "first", being_vq_path=vq, vbpe=vbpe_file) == 0
    command = f"""python beingvl/utils/convert_llama_to_being.py \\
        --llama_path {llama} \\
        --being_tokenizer_config_path {tmp_path / "first"} \\
        --being_vq_path {vq} \\
        --output_path {tmp_path / "base"} \\
        --verify_loading --num_merges 3"""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", command], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "text logits                equal" in done.stdout
    ours, first = WeightFolder(tmp_path / "base"), WeightFolder(tmp_path / "first")
    assert all(torch.equal(ours[name], first[name]) for name in first)


def test_the_guides_script_needs_no_installation():
    """With -S, site-packages is a plain folder: its .pth files do not count, so an installed
    beingvl is not found.
    """
    command = [sys.executable, "-S", "beingvl/utils/convert_llama_to_being.py", "--help"]
    environment = {"PYTHONPATH": str(Path(np.__file__).parents[1]), "PATH": os.environ["PATH"]}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "--vqgan" in done.stdout, done.stderr
