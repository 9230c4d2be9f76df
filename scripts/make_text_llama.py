"""Pre-train a small text-only LLaMA on the lines of a text file, as a stand-in for Llama-3.1-8B on
machines without a GPU.

    python scripts/make_text_llama.py --texts texts.txt --output_path llama/

The result is a stock Hugging Face folder: a byte-level BPE tokenizer trained on the same lines (it
can encode any text), with Llama-3's begin and end tokens, and an untied float32 LlamaForCausalLM
with about 0.9 million parameters.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from beingvl.artefact.files import give_usual_mode
from beingvl.artefact.hashes import hash_file
from beingvl.artefact.manifest import write_manifest
from beingvl.artefact.owner import making_alone
from beingvl.artefact.progress import progress as show_progress
from beingvl.errors import InputError

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
NUM_BYTES = 256  # the byte alphabet of byte-level BPE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--texts", type=Path, required=True, help="UTF-8 text file, one example per line"
    )
    parser.add_argument("--output_path", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--vocab_size",
        type=int,
        default=320,
        help="text ids: 256 bytes, merges, begin and end token",
    )
    parser.add_argument(
        "--hidden_size", type=int, default=128, help="a multiple of 32, the head size"
    )
    parser.add_argument("--num_layers", type=int, default=4, help="decoder layers")
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps")
    parser.add_argument("--batch_size", type=int, default=8, help="windows per step")
    parser.add_argument("--sequence_length", type=int, default=96, help="tokens per window")
    parser.add_argument(
        "--learning_rate", type=float, default=4e-3, help="peak; warm-up, then cosine to a tenth"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and of the order")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished output folder")


def run(args: argparse.Namespace) -> None:
    lines = read_lines(args.texts)
    if args.vocab_size < NUM_BYTES + 2:
        raise InputError(
            f"--vocab_size is {args.vocab_size}, expected at least {NUM_BYTES + 2} (256 "
            "bytes, begin, end)"
        )
    if args.hidden_size % 32 or args.hidden_size < 32:
        raise InputError(f"--hidden_size is {args.hidden_size}, expected a multiple of 32")
    request = {
        name: value
        for name, value in sorted(vars(args).items())
        if name not in ("texts", "output_path", "overwrite")
    }
    request["texts"] = hash_file(args.texts)
    with making_alone(args.output_path, "model", request, args.overwrite) as is_new:
        if is_new:
            write(args, lines, request)


def write(args: argparse.Namespace, lines: list[str], request: dict[str, Any]) -> None:
    """Train tokenizer and model, and write the folder."""
    import torch
    from safetensors.torch import save_file

    tokenizer = train_tokenizer(lines, args.vocab_size)
    stream = torch.tensor(
        [
            token
            for line in tokenizer(lines)["input_ids"]
            for token in [*line, tokenizer.eos_token_id]
        ]
    )
    torch.manual_seed(args.seed)
    model = make_model(tokenizer, args.hidden_size, args.num_layers)
    loss = pretrain(model, stream, args)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{num_parameters:,} parameters, {len(tokenizer)} text ids, loss in the last tenth of the "
        f"steps {loss:.3f} nats per token"
    )

    model.generation_config.bos_token_id, model.generation_config.eos_token_id = (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
    )
    # model.save_pretrained would load DeepSpeed and draw a bar for the same bytes
    model.config.architectures, model.config.dtype = [type(model).__name__], "float32"
    for part in (model.config, model.generation_config):
        part.save_pretrained(args.output_path)
    save_file(model.state_dict(), args.output_path / "model.safetensors", {"format": "pt"})
    give_usual_mode(args.output_path / "model.safetensors")
    tokenizer_files = tokenizer.save_pretrained(args.output_path)
    names = {"config.json", "generation_config.json", "model.safetensors"}
    names |= {Path(file).name for file in tokenizer_files}
    write_manifest(
        args.output_path,
        "model",
        {"parameters": num_parameters, "loss": round(loss, 4)},
        {},
        {"request": request},
        belongs=names.__contains__,
    )


def read_lines(path: Path) -> list[str]:
    """The non-empty lines of a UTF-8 text file. Raises InputError if there are none."""
    if not path.is_file():
        raise InputError(f"{path} is not a file; expected a text file with one example per line")
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 ({error}); save it as UTF-8") from error
    if not lines:
        raise InputError(f"{path} holds no text; expected one example per line")
    return lines


def train_tokenizer(lines: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that, like Llama-3's, starts every text with the begin token; the
    begin and end tokens have the last ids.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.add_special_tokens([BOS, EOS])
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, bos_id)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)


def make_model(
    tokenizer: PreTrainedTokenizerFast, hidden_size: int, num_layers: int
) -> LlamaForCausalLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 32,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},  # sequences here are short
        initializer_range=hidden_size**-0.5,  # LLaMA's 0.02 suits a hidden size of thousands
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def pretrain(model: LlamaForCausalLM, stream: torch.Tensor, args: argparse.Namespace) -> float:
    """Next-token training on random windows of the token stream `[n]`; returns the mean loss of
    the last tenth of the steps.
    """
    import torch

    stream = stream.repeat(-(-(args.sequence_length + 2) // len(stream)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.01)
    random = torch.Generator().manual_seed(args.seed)
    warmup = max(1, args.steps // 20)
    window = torch.arange(args.sequence_length + 1)
    losses = []
    model.train()
    with show_progress(range(args.steps), name="text LLaMA", unit="step") as progress:
        for step in progress:
            cosine = 0.55 + 0.45 * math.cos(math.pi * step / args.steps)
            optimizer.param_groups[0]["lr"] = (
                args.learning_rate * min(1.0, (step + 1) / warmup) * cosine
            )
            starts = torch.randint(
                len(stream) - args.sequence_length, (args.batch_size, 1), generator=random
            )
            tokens = stream[starts + window]
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            progress.set_postfix(loss=f"{losses[-1]:.3f}")
    tail = losses[-max(1, args.steps // 10) :]
    return sum(tail) / len(tail)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    try:
        run(parser.parse_args(argv))
    except (InputError, OSError) as error:
        print(f"make_text_llama: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
