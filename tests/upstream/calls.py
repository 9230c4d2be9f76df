"""What is executed for each row of docs/how-to/coming-from-being-vl-0.5.md.

CHECKS   first cell of a row, without backticks -> a function that does it in a World, asserts
         what comes of it, and returns WORD_FOR_WORD or ONE_SENTENCE
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from beingvl.data.arrow_shards import ShardReader
from beingvl.model.weight_files import WeightFolder
from beingvl.vbpe.visual_bpe import VisualBPE
from beingvl.vocab import VocabLayout
from tests.upstream.artefacts import DECODER_TENSORS, MERGES, TINY, token_text
from tests.upstream.world import INSTEAD, SIZES, Done, World

WORD_FOR_WORD, ONE_SENTENCE = "word for word", "one sentence"
Check = Callable[[World], str]
CHECKS: dict[str, Check] = {}


def row(*names: str) -> Callable[[Check], Check]:
    """Declare the check of the rows with these first cells."""

    def add(check: Check) -> Check:
        CHECKS.update(dict.fromkeys(names, check))
        return check

    return add


def succeeded(done: Done, *expected: str) -> str:
    assert done.code == 0, done.said
    for text in expected:
        assert text in done.said, done.said
    return WORD_FOR_WORD


def refused(done: Done, *expected: str) -> str:
    """Exit code 2 and one line of error."""
    assert done.code == 2 and done.said.count("error:") == 1, done.said
    (line,) = [line for line in done.said.splitlines() if "error:" in line]
    assert done.said.endswith(f"{line}\n"), done.said
    for text in expected:
        assert text in line, line
    return ONE_SENTENCE


# ---- commands ----


@row("python beingvl/utils/convert_llama_to_being.py")
def convert(world: World) -> str:
    assert VocabLayout.load(world.base) == TINY
    return succeeded(world.converted)


@row("python beingvl/utils/convert_llama_beingvl.py")
def convert_by_its_real_name(world: World) -> str:
    done = world.convert("base-2", "--extended_vocab_size {new_ids}", "convert_llama_beingvl")
    return succeeded(done)


@row("bash beingvl/scripts/convert_llama_beingvl.sh")
def convert_by_script(world: World) -> str:
    output = world.folder / "base-3"
    paths = {"LLAMA_PATH": world.llama3, "TOKENIZER_PATH": world.tokenizer}
    paths |= {"VQ_PATH": world.vqgan, "OUTPUT_PATH": output}
    script = "beingvl/scripts/convert_llama_beingvl.sh"
    done = world.bash(script, "--extended_vocab_size", SIZES["new_ids"], **paths)
    assert done.code == 0 and VocabLayout.load(output) == TINY, done.said
    return WORD_FOR_WORD


@row("python beingvl/train/train_vbpe.py")
def train_vbpe(world: World) -> str:
    assert VisualBPE.load(world.vbpe).num_codes == TINY.num_vq
    return succeeded(world.trained_vbpe)


@row("python beingvl/utils/tokenize_dataset.py", "tokenize --dataset_name")
def tokenize(world: World) -> str:
    """By default the dataset is called MODE_STEM; a given name is kept."""
    succeeded(world.tokenized)
    assert (world.folder / "tokenized" / "pt_train_vbpe.jsonl").is_file()
    done = world.tokenize("tokenized_sft", "--dataset_name stage2", mode="sft")
    assert (world.folder / "tokenized_sft" / "stage2_base.jsonl").is_file(), done.said
    return WORD_FOR_WORD


def start_stage(stage: int, world: World) -> str:
    """Stage 1 with MODEL_PATH and with the model as the second word; the others find theirs."""
    if stage == 1:
        for done in (world.with_paths, world.with_variables):
            succeeded(done, f"--model {world.base} ", "--num_gpus 1 ")
        return WORD_FOR_WORD
    before = world.folder / "models" / f"stage-{stage - 1}" / "final"
    shutil.copytree(world.base, before)
    return succeeded(world.train(stage), f"--model {before} ")


for number in (1, 2, 3):
    name = f"bash beingvl/scripts/train-stage-{number}.sh <id> [model]"
    CHECKS[name] = partial(start_stage, number)


@row("zero2.json as --deepspeed_config")
def zero2(world: World) -> str:
    fields = {
        "fp16": {"enabled": "auto"},
        "scheduler": {"type": "WarmupLR"},
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {"stage": 2},
    }
    path = world.folder / "zero2.json"
    path.write_text(json.dumps(fields))
    output = world.folder / "never"
    paths = ("--model", world.base, "--data", world.folder, "--output", output)
    done = world.beingvl("train", "--deepspeed_config", path, *paths)
    keys = [name for name in fields if name != "zero_optimization"]
    return refused(done, *keys, "start from ds_configs/stage1.json")


# ---- options ----


def has_option(option: str, run: str, world: World) -> str:
    """The option was among the words of a run that succeeded."""
    done = getattr(world, run)
    assert option in done.words, done.words
    return succeeded(done)


OPTIONS = {
    ("convert", "converted"): (
        *("--llama_path", "--being_tokenizer_config_path", "--being_vq_path", "--output_path"),
        *("--verify_loading", "--torch_dtype", "--vocab_size", "--extended_vocab_size"),
    ),
    ("train_vbpe", "trained_vbpe"): (
        *("--data_path", "--num_merges", "--init_size", "--vocab_pad", "--vocab_end"),
        *("--validate_data", "--save_intermediate"),
    ),
    ("tokenize", "tokenized"): (
        *("--mode", "--json_path", "--image_path", "--output_dir", "--model_path", "--vbpe_path"),
        *("--batch_size", "--num_workers", "--torch_dtype"),
        *("--vbpe_init_size", "--vbpe_vocab_pad", "--vbpe_vocab_end"),
    ),
}
for (command, run), options in OPTIONS.items():
    for option in options:
        CHECKS[f"{command} {option}"] = partial(has_option, option, run)


@row("train_vbpe --output_path vbpe.pkl")
def output_is_a_folder(world: World) -> str:
    assert (world.vbpe / "vbpe.json").is_file()
    return succeeded(world.trained_vbpe, f"{world.vbpe} is a folder that holds vbpe.json")


# ---- variables ----


def has_path(variable: str, world: World) -> str:
    path = world.paths[variable]  # a JSONL file's shards lie beside it
    return succeeded(world.with_paths, str(path.with_suffix("")))


for variable in ("MODEL_PATH", "DATA_PATH", "OUTPUT_DIR", "LOG_DIR"):
    CHECKS[variable] = partial(has_path, variable)


def has_note(variable: str, world: World) -> str:
    done = world.with_variables
    succeeded(done)
    (line,) = [line for line in done.said.splitlines() if line.startswith(f"note: {variable}=")]
    assert INSTEAD[variable] in line, line
    return ONE_SENTENCE


for variable in INSTEAD:
    CHECKS[variable] = partial(has_note, variable)


# ---- model types ----


def model_type(base: str, num_merges: int, world: World) -> str:
    output = world.folder / f"{base}-{num_merges}"
    words = ("--llama_path", getattr(world, base), "--being_vq_path", world.base / "vqgan")
    done = world.beingvl("convert", *words, "--num_merges", num_merges, "--output_path", output)
    succeeded(done)
    layout = VocabLayout.load(output)
    assert (layout.num_vq, layout.num_merges) == (TINY.num_vq, num_merges)
    return WORD_FOR_WORD if num_merges else ONE_SENTENCE


for base in ("llama3", "llama2"):
    CHECKS[f"{base}+vqgan+8k"] = partial(model_type, base, TINY.num_merges)
    CHECKS[f"{base}+vqgan"] = partial(model_type, base, 0)


@row("chameleon+8k")
def chameleon(world: World) -> str:
    """Chameleon itself as a base, which normalises queries and keys."""
    folder, output = world.folder / "chameleon-7b", world.folder / "never"
    shutil.copytree(world.published_model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    done = world.beingvl("convert", "--llama_path", folder, "--output_path", output)
    assert not output.exists()
    return refused(done, "is a Chameleon model", "start from a LLaMA")


# ---- files ----


@row("being-tokenizer-config/")
def tokenizer_folder(world: World) -> str:
    """Ids and names are kept."""
    tokenizer = Tokenizer.from_file(str(world.base / "tokenizer.json"))
    texts = [tokenizer.id_to_token(token_id) for token_id in range(TINY.num_text, TINY.size)]
    assert texts == [token_text(token_id, TINY) for token_id in range(TINY.num_text, TINY.size)]
    return WORD_FOR_WORD


@row("preprocessor_config.json in the tokenizer folder")
def preprocessor(world: World) -> str:
    name = "preprocessor_config.json"
    assert (world.base / "vqgan" / name).read_text() == (world.tokenizer / name).read_text()
    return WORD_FOR_WORD


@row("being-vq-8k/")
def vqgan(world: World) -> str:
    ours, theirs = (
        load_file(folder / "model.safetensors") for folder in (world.base / "vqgan", world.vqgan)
    )
    assert len([name for name in theirs if name.startswith("decoder.")]) == DECODER_TENSORS
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    return WORD_FOR_WORD


@row("vbpe.pkl")
def pickled_vbpe(world: World) -> str:
    done = world.tokenize("tokenized_pickle", "--vbpe_path {pickle}", pickle=world.pickle)
    succeeded(done)
    rows = world.folder / "tokenized_pickle" / "pt_train_vbpe.jsonl"
    words = ("--jsonl_path", rows, "--vbpe_path", world.pickle, "--model_path", world.base)
    output = world.folder / "shards_of_pickle"
    succeeded(world.beingvl("build-shards", *words, "--output_path", output, "--num_workers", 0))
    words = ("--llama_path", world.llama3, "--being_vq_path", world.base / "vqgan")
    output = world.folder / "base_of_pickle"
    words += ("--vbpe", world.pickle, "--output_path", output)
    succeeded(world.beingvl("convert", *words))
    assert VocabLayout.load(output).num_vq == TINY.num_vq
    words = ("--init_size", TINY.num_vq, "--vocab_pad", SIZES["vocab_pad"])
    output = world.folder / "imported_vbpe"
    words = ("--import_pkl", world.pickle, *words, "--output_path", output)
    succeeded(world.beingvl("train-vbpe", *words))
    assert VisualBPE.load(output).merges.tolist() == [list(pair) for pair in MERGES]
    return WORD_FOR_WORD


def published_file(variant: int, world: World) -> str:
    """Base or merged rows become shards, whose template they record."""
    path = world.published_rows[variant]
    output = world.folder / f"shards_{variant}"
    words = ("--jsonl_path", path, "--model_path", world.base, "--output_path", output)
    succeeded(world.beingvl("build-shards", *words, "--num_workers", 0))
    shards = ShardReader(output)
    fields = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(shards) == len(fields) and shards.manifest.details["template"] == "being-vl-0.5"
    first, image = fields[0], ("token_image", "token_image_new")[variant]
    assert shards[0].input_ids.tolist() == first["token_0"] + first[image] + first["token_1"]
    return WORD_FOR_WORD


CHECKS["NAME_base.jsonl"] = partial(published_file, 0)
CHECKS["NAME_vbpe.jsonl"] = partial(published_file, 1)


@row("multi-turn rows")
def multi_turn(world: World) -> str:
    more = "--template being-vl-0.5 --dataset_name data"
    succeeded(world.tokenize("tokenized_published", more))
    ours, theirs = (
        [json.loads(line)["token_1"] for line in path.read_text().splitlines()]
        for path in (world.folder / "tokenized_published/data_base.jsonl", world.published_rows[0])
    )
    assert ours == theirs and any(row.count(TINY.sep_id) for row in ours)
    return WORD_FOR_WORD


@row("a model folder")
def model_folder(world: World) -> str:
    """Its language model is a stock LLaMA, tensor by tensor; elsewhere one sentence imports it."""
    imported, published = WeightFolder(world.imported), WeightFolder(world.published_model)
    assert VocabLayout.load(world.imported) == TINY
    config = json.loads((world.imported / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert all(torch.equal(imported[name], published[name]) for name in imported)
    model, output = world.published_model, world.folder / "never"
    hint = f"beingvl export --model {model}"
    rows = ("--json_path", world.json, "--output_dir", output)
    refused(world.beingvl("convert", "--llama_path", model, "--output_path", output), hint)
    refused(world.beingvl("tokenize", "--model_path", model, *rows), hint)
    refused(world.beingvl("generate", "--model", model, "--prompt", "What is it?"), hint)
    done = world.train(1, model)
    assert done.code == 2 and hint in done.said, done.said
    assert not output.exists()
    return ONE_SENTENCE


@row("a model folder, written")
def model_folder_written(world: World) -> str:
    output = world.folder / "exported"
    words = ("--model", world.imported, "--format", "being-vl-0.5", "--output_path", output)
    succeeded(world.beingvl("export", *words))
    ours, theirs = (
        json.loads((folder / "config.json").read_text())
        for folder in (output, world.published_model)
    )
    for name in ("architectures", "model_type", "vocabulary_map", "boi_token_id", "vq_config"):
        assert ours[name] == theirs[name], name
    exported, published = WeightFolder(output), WeightFolder(world.published_model)
    assert set(exported) == set(published)
    assert all(torch.equal(exported[name], published[name]) for name in published)
    return ONE_SENTENCE
