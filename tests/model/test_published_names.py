"""The published form holds the same bytes under the published names, computes the same, and comes
back bit-identical.
"""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from beingvl.artefact.manifest import read_manifest, verify_folder
from beingvl.commands.main import main
from beingvl.errors import InputError
from beingvl.images.vqgan import VQGAN
from beingvl.model.published_names import PREFIX, read_published, write_published
from beingvl.model.tokenizer_files import load_tokenizer
from beingvl.model.weight_files import WeightFolder
from beingvl.vocab import LAYOUT_FILE, VocabLayout
from tests.command import argv, beingvl
from tests.damage import list_anew
from tests.model.small_models import LLAMA3_ROPE, write_base_model, write_vbpe, write_vqgan


def write_base(folder, family: str = "llama"):
    llama = write_base_model(folder / "llama", family, "sharded", torch.bfloat16)
    vq = write_vqgan(folder / "vq")
    write_vbpe(folder / "vbpe.json", vq)
    options = {"being_vq_path": vq, "vbpe": folder / "vbpe.json", "output_path": folder / "base"}
    assert beingvl("convert", llama_path=llama, **options) == 0
    return folder / "base"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("published"))


def equal_tensors(a, b) -> bool:
    ours, theirs = WeightFolder(a), WeightFolder(b)
    same = all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name])
        for name in theirs
    )
    return set(ours) == set(theirs) and same


def fields(path) -> dict:
    return json.loads(path.read_text())


def test_there_and_back_is_bit_identical(tmp_path, base):
    there, back = tmp_path / "published", tmp_path / "back"
    write_published(base, there)
    published = WeightFolder(there)
    assert {name.split(".")[0] for name in published} == {"model", "lm_head"}
    vq_names = {name.removeprefix(PREFIX) for name in published if name.startswith(PREFIX)}
    assert vq_names == set(WeightFolder(base / "vqgan"))
    verify_folder(there)

    manifest = read_published(there, back)
    assert equal_tensors(back, base) and equal_tensors(back / "vqgan", base / "vqgan")
    original = read_manifest(base)
    assert manifest.kind == "model" and manifest.lineage == original.lineage
    assert manifest.details == original.details
    names = {path.relative_to(base) for path in base.rglob("*") if path.is_file()}
    assert {path.relative_to(back) for path in back.rglob("*") if path.is_file()} == names
    for name in ("generation_config.json", "vbpe.json", LAYOUT_FILE):
        assert fields(back / name) == fields(base / name)
    ours, theirs = (LlamaConfig.from_pretrained(folder).to_dict() for folder in (back, base))
    assert ours == theirs
    fingerprints = {VQGAN.load(folder / "vqgan").fingerprint() for folder in (back, base)}
    assert len(fingerprints) == 1
    verify_folder(back)


def test_the_published_config(tmp_path, base):
    write_published(base, tmp_path / "published")
    layout, config = VocabLayout.load(base), fields(tmp_path / "published" / "config.json")
    assert config["model_type"] == "chameleon"
    assert config["architectures"] == ["ChameleonForConditionalGeneration"]
    assert config["vq_config"]["model_type"] == "janus_vqgan"
    assert config["rope_scaling"] is None and "rope_parameters" not in config
    ids = {"boi": layout.boi_id, "eoi": layout.eoi_id, "image": layout.image_placeholder_id}
    assert {name: config[f"{name}_token_id"] for name in ids} == ids
    names = config["vocabulary_map"]
    assert list(names.values()) == list(range(layout.size))
    # from these the published class knows the image tokens
    image = [number for name, number in names.items() if name.startswith("IMGIMG")]
    assert image == list(range(layout.first_image_id, layout.size))
    assert names["IMGIMGAAADCBZ"] == 321  # merges are named by their ids


def test_the_published_tokenizer_and_processor(tmp_path, base):
    there = tmp_path / "published"
    write_published(base, there)
    merges = fields(there / "tokenizer.json")["model"]["merges"]
    assert merges and all(isinstance(merge, str) and merge.count(" ") == 1 for merge in merges)
    ours, theirs = load_tokenizer(there), load_tokenizer(base)
    for text in ("Which digit is this?", "<eoss>3 × 4 IMGIMGAAAAAAZ</s>"):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert fields(there / "special_tokens_map.json")["pad_token"] == "<pad>"
    processor = fields(there / "processor_config.json")
    assert processor["image_seq_length"] == 16 and processor["image_token"] == "<image>"
    image = fields(there / "preprocessor_config.json")
    assert image["image_processor_type"] == "ChameleonImageProcessor"
    assert image["crop_size"] == {"height": 16, "width": 16}


def test_logits_are_those_of_a_stock_llama_with_plain_rope(tmp_path, base):
    write_published(base, tmp_path / "published")
    config = fields(tmp_path / "published" / "config.json")
    sizes = {key: config[key] for key in LlamaConfig().to_dict().keys() & config.keys()}
    rope = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    sizes |= {"model_type": "llama", "rope_parameters": rope}
    model = LlamaForCausalLM._from_config(LlamaConfig.from_dict(sizes), dtype=torch.bfloat16)
    weights = WeightFolder(tmp_path / "published")
    model.load_state_dict({name: weights[name] for name in weights if PREFIX not in name})
    prompt = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(base)(prompt).logits
        assert torch.equal(model(prompt).logits, theirs)


def test_the_command_goes_there_and_back(tmp_path, base, capsys):
    there, back = tmp_path / "published", tmp_path / "back"
    publish = {"model": base, "format": "being-vl-0.5"}
    assert beingvl("export", **publish, output_path=there) == 0
    said = capsys.readouterr().out
    assert "is a janus_vqgan; the published class reads chameleon_vqgan only" in said
    assert beingvl("export", model=there, output_path=back) == 0
    assert equal_tensors(back, base) and equal_tensors(back / "vqgan", base / "vqgan")
    assert beingvl("export", model=there, output_path=back) == 2  # finished already
    for model, message in (
        (base, "give --checkpoint or --format"),
        (base.parent / "llama", "it is not a Being-VL model folder"),
        (base.parent / "vq", "it is not a Being-VL model folder"),
    ):
        assert beingvl("export", model=model, output_path=tmp_path / "never") == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "never").exists()


def test_unchanged_shards_are_links(tmp_path, base):
    write_published(base, tmp_path / "published")
    written = (tmp_path / "published").glob("*.safetensors")
    linked = [path for path in written if path.samefile(base / path.name)]
    assert len(linked) == len(WeightFolder(base).files) - 1


def test_scaled_rope_is_refused_or_left_out(tmp_path, capsys):
    base, there = write_base(tmp_path, "llama3"), tmp_path / "published"
    publish = argv("export", model=base, format="being-vl-0.5", output_path=there)
    assert main(publish) == 2
    error = capsys.readouterr().err
    assert "scales its rope by 'llama3'" in error and not there.exists()
    assert "with --rope_scaling none the scaling is left out, and 3 of 4 frequencies" in error
    assert main([*publish, "--rope_scaling", "none"]) == 0
    assert "rope scaling 'llama3' is left out: 3 of 4 frequencies" in capsys.readouterr().out
    assert fields(there / "config.json")["rope_scaling"] is None
    read_published(there, tmp_path / "back")
    rope = LlamaConfig.from_pretrained(tmp_path / "back").rope_parameters
    assert rope == {"rope_type": "default", "rope_theta": LLAMA3_ROPE["rope_theta"]}
    only = ["--rope_scaling", "none", "--output_path", str(tmp_path / "never")]
    assert main(["export", "--model", str(there), *only]) == 2
    assert "--rope_scaling belongs to --format being-vl-0.5" in capsys.readouterr().err


def test_a_linear_scaling_is_kept(tmp_path, base):
    shutil.copytree(base, tmp_path / "base")
    config = fields(base / "config.json")
    config["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    list_anew(tmp_path / "base")
    write_published(tmp_path / "base", tmp_path / "published")
    scaling = fields(tmp_path / "published" / "config.json")["rope_scaling"]
    assert scaling == {"type": "linear", "factor": 2.0}
    read_published(tmp_path / "published", tmp_path / "back")
    rope = LlamaConfig.from_pretrained(tmp_path / "back").rope_parameters
    assert (rope["rope_type"], rope["factor"]) == ("linear", 2.0)


def test_a_folder_exported_before_the_config_was_chameleons(tmp_path, base):
    """It had LLaMA's config and a vq_config, and the tokenizer as it was."""
    old = tmp_path / "old"
    write_published(base, old)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(base / name, old / name)
    config = fields(base / "config.json")
    config["vq_config"] = fields(base / "vqgan" / "config.json")
    (old / "config.json").write_text(json.dumps(config))
    list_anew(old)
    read_published(old, tmp_path / "back")
    assert equal_tensors(tmp_path / "back", base)
    for name in ("config.json", "tokenizer.json"):
        assert fields(tmp_path / "back" / name) == fields(base / name)


def test_other_folders_are_refused(tmp_path, base):
    with pytest.raises(InputError, match=r"has no weights model\.vqmodel\."):
        read_published(base, tmp_path / "never")
    shutil.copytree(base, tmp_path / "blind")
    shutil.rmtree(tmp_path / "blind" / "vqgan")
    with pytest.raises(InputError, match="has no vqgan/"):
        write_published(tmp_path / "blind", tmp_path / "never")
    other = tmp_path / "qwen"
    other.mkdir()
    with pytest.raises(InputError, match="is a 'qwen2' model; the published form holds LLaMA"):
        write_published(write_base(other, "qwen2"), tmp_path / "never")
    assert not (tmp_path / "never").exists()
