"""A trained Being-VL as one object: prompts and images in, answers out.

    model = BeingVL("stage-3/final", "vbpe.json").load_model("bfloat16")
    model.generate_with_vbpe(["Which digit is this?"], ["a.png"], max_new_tokens=16)  -> ["seven"]

    images ──img2tok──> token ids ──tokenize (the chat template)──> prompt ids
                        │           ──answer_token_sequences──> answers
                        └──tok2img──> pictures

The chat template is `beingvl.data.conversation.build_sequence`, in the variant that the model was
trained on, according to its manifest. Generation is transformers' own. Prompts of different lengths
share a batch (batches.py); each gets the same answer as alone. Image tokens have the positions they
had in training, which may be their anchors (`beingvl.data.positions`).
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers import GenerationConfig, StoppingCriteriaList

from beingvl.artefact.manifest import join_lineages, read_manifest
from beingvl.data.chat_template import BASE_TEMPLATE
from beingvl.data.conversation import (
    IMAGE_PLACEHOLDER,
    STOP_TEXTS,
    TextEncoder,
    build_sequence,
)
from beingvl.data.made_with import DEFAULT, IMAGE_POSITIONS, RUNNING, TEMPLATE
from beingvl.data.positions import PositionIds
from beingvl.data.variant import MERGED, RAW, variant_of
from beingvl.errors import InputError
from beingvl.images.preprocess import exif_of
from beingvl.images.vqgan import VQGAN
from beingvl.inference.asked import (
    Images,
    Prompt,
    Prompts,
    check_names,
    check_positive,
    images_of_entry,
    is_one_prompt,
    one_of,
    pairs_of,
    refuse_one_image,
    turns_of,
)
from beingvl.inference.base_prompts import BasePrompts
from beingvl.inference.batches import Ids, batch_inputs, reading_order
from beingvl.inference.draw import before_drawing, draw_pictures
from beingvl.inference.hub import fetched, push
from beingvl.inference.published_calls import SaysWhatReplaces, device_of, missing, positional
from beingvl.inference.reading import dtype_of, own_device, read_model
from beingvl.inference.running_batch import RunningBatch, continue_in_turn
from beingvl.inference.sampling import SAMPLING, sampling_options
from beingvl.inference.streaming import EndsRows, StopAtText, TextPieces, TextStreamer, cut_at
from beingvl.model.start_model import context_of, find_start_model
from beingvl.vbpe.published import LegacyVisualBPE
from beingvl.vbpe.vbpe_file import VBPE_FILE
from beingvl.vbpe.visual_bpe import VisualBPE, load_for_layout
from beingvl.vocab import VocabLayout

VQGAN_FOLDER = "vqgan"
TOKENS_OF = {MERGED: "merged image tokens (vBPE)", RAW: "plain image codes (--raw)"}


class BeingVL(metaclass=SaysWhatReplaces):
    """A model folder and a vBPE vocabulary. Tokenization works at once; `load_model` loads the
    weights.

    Raises InputError for a folder that is not a finished Being-VL model, or a vBPE that does not
    belong to it.
    """

    def __init__(
        self,
        model_path: Path | str,
        vbpe_path: Path | str | None = None,
        *,
        template: str | None = None,
        device_map: Any = None,
    ) -> None:
        """A stage folder means its `final/`. Without `vbpe_path`, the vbpe.json inside the model
        folder is used, if there is one. `template` overrides the one used in training.
        `device_map`, one device, is where `load_model` puts the model by default.
        """
        self._device = device_of(device_map)
        self.model_path = find_start_model(Path(model_path))
        self.layout = VocabLayout.load(self.model_path)
        self.manifest = read_manifest(self.model_path, "model")
        template = template or TEMPLATE.of(self.manifest) or DEFAULT
        self.template = template if template == BASE_TEMPLATE else TEMPLATE.check(template)
        self.variant = variant_of(self.manifest, self.layout)
        self.encoder = TextEncoder(self.model_path, self.layout)
        is_base = self.template == BASE_TEMPLATE
        self._base = BasePrompts(self.model_path, self.layout, self.encoder) if is_base else None
        own = self.model_path / VBPE_FILE
        self._vbpe_path = vbpe_path or (own if own.is_file() else None)
        self.vbpe = self._load_vbpe(Path(self._vbpe_path)) if self._vbpe_path else None
        self._without_merges = VisualBPE(self.layout.num_vq, np.zeros((0, 4), np.int32))
        self.image_positions = IMAGE_POSITIONS.check(IMAGE_POSITIONS.of(self.manifest) or RUNNING)
        self._model: Any = None
        self._was_told = False

    # ---- loading ----

    @classmethod
    def from_pretrained(
        cls,
        name: Path | str,
        vbpe_path: Path | str | None = None,
        *,
        template: str | None = None,
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        device_map: Any = None,
        **hub: Any,
    ) -> BeingVL:
        """A loaded model from a folder or from the Hub (`hub`: HUB_OPTIONS). `dtype` and
        `torch_dtype` are the same, and a `device_map` names one device.
        """
        others = ("vbpe_path", "template", "dtype", "torch_dtype", "device", "device_map")
        dtype = one_of(dtype=dtype, torch_dtype=torch_dtype)
        device = one_of(device=device, device_map=device_of(device_map))
        folder = fetched(name, hub, others)
        model = cls(folder, vbpe_path, template=template, device_map=device_map)
        return model.load_model(dtype, device)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, **hub: Any) -> str:
        """Upload the model folder, with the vBPE in use, to the Hub; returns the URL. `hub`: token,
        revision, commit_message.
        """
        path = Path(self._vbpe_path) if self._vbpe_path else None
        path = path / VBPE_FILE if path and path.is_dir() else path
        extra = path if path and path.parent != self.model_path else None
        return push(self.model_path, repo_id, extra, private, **hub)

    def load_model(
        self,
        torch_dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        *more: Any,
        **published: Any,
    ) -> BeingVL:
        """Load the weights, in the dtype of `dtype_of`, onto `own_device(device)`; returns self.

        `published`: further arguments that Being-VL-0.5 accepts here, by name. A vBPE and its sizes
        are read and checked by `load_for_layout`; torch chooses the attention kernel.
        """
        if more or (torch_dtype and Path(str(torch_dtype)).exists()):
            raise positional(torch_dtype)
        self._take_published(**published)
        target = own_device(device or self._device)
        dtype = dtype_of(self.model_path, torch_dtype, target)
        try:
            model = read_model(self.model_path, dtype, target)
        except InputError:
            raise
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"{self.model_path} cannot be loaded ({reason}); `beingvl verify` shows which "
                "file changed"
            ) from error
        num_rows = model.get_input_embeddings().num_embeddings
        if num_rows < self.layout.size:
            raise InputError(
                f"{self.model_path}: the embedding has {num_rows} rows, but the vocabulary has "
                f"{self.layout.size} ids"
            )
        # The base model's generation defaults (a different stop token, sampling) must not apply.
        model.generation_config = GenerationConfig()
        self._model = model
        return self

    def _take_published(
        self,
        model_path: Path | str | None = None,
        vbpe_path: Path | str | None = None,
        vbpe_init_size: int | None = None,
        vbpe_vocab_pad: int | None = None,
        vbpe_vocab_end: int | None = None,
        flash_attn: Any = None,
    ) -> None:
        if model_path and find_start_model(Path(model_path)) != self.model_path:
            raise InputError(
                f"load_model loads {self.model_path}; for {model_path} create a new "
                "BeingVL(model_path, vbpe_path)"
            )
        sizes = vbpe_init_size, vbpe_vocab_pad, vbpe_vocab_end
        if path := vbpe_path or (self._vbpe_path if any(sizes) else None):
            self.vbpe = self._load_vbpe(Path(path), *sizes)

    def __getattr__(self, name: str) -> NoReturn:
        raise missing(name)

    @property
    def model(self) -> Any:
        """The transformers model; loaded with default settings on first use."""
        if self._model is None:
            self.load_model()
        return self._model

    @cached_property
    def context(self) -> int | None:
        """Limit of prompt plus answer, in tokens; None if config.json does not give it."""
        return context_of(self.model_path)

    @cached_property
    def vqgan(self) -> VQGAN:
        """The VQ-GAN inside the model folder, in float32, on the loaded model's device.

        Raises InputError if it is missing or not the one that the model was trained with.
        """
        folder = self.model_path / VQGAN_FOLDER
        if not folder.is_dir():
            raise InputError(
                f"{self.model_path} has no {VQGAN_FOLDER}/, so it cannot read images; convert "
                "with --vqgan"
            )
        device = self._model.device if self._model is not None else "cpu"
        vqgan = VQGAN.load(folder, device, exif=exif_of(self.manifest.lineage))
        self._refuse_others(folder, {"vqgan": vqgan.fingerprint()})
        return vqgan

    def _load_vbpe(self, path: Path, *sizes: int | None) -> VisualBPE | LegacyVisualBPE:
        vbpe = load_for_layout(path, self.layout, *sizes)
        self._refuse_others(path, {**vbpe.lineage, "vbpe": vbpe.fingerprint()})
        return vbpe

    def _refuse_others(self, path: Path, lineage: dict[str, str]) -> None:
        join_lineages({str(self.model_path): self.manifest.lineage, str(path): lineage})

    # ---- images and text to token ids ----

    def img2codes(self, images: Sequence[Any], batch_size: int = 64) -> np.ndarray:
        """Images (paths, URLs, PIL images, arrays `[H, W, 3]` uint8) to VQ codes `[N, h, w]`
        uint16.
        """
        refuse_one_image(images)
        parts = [
            self.vqgan.encode(self.vqgan.preprocess(images[start : start + batch_size]))
            for start in range(0, len(images), batch_size)
        ]
        return np.concatenate(parts) if parts else np.empty((0, *self.vqgan.grid), np.uint16)

    def codes2tok(self, codes: np.ndarray, with_vbpe: bool | None = None) -> list[np.ndarray]:
        """VQ codes `[N, h, w]` to one array of token ids `[n]` int32 per image: merged tokens or
        plain codes; by default what the model was trained on.
        """
        if not self.uses_vbpe(with_vbpe):
            return [self.layout.image_to_token_ids(grid.ravel()) for grid in codes]
        ids, offsets = self._given_vbpe().encode_batch(codes)
        token_ids = self.layout.image_to_token_ids(ids)
        return [token_ids[start:end] for start, end in itertools.pairwise(offsets.tolist())]

    def uses_vbpe(self, with_vbpe: bool | None = None) -> bool:
        """`with_vbpe`, by default what the model was trained on. Warns if the two differ."""
        if with_vbpe is None or self.variant is None:
            return self.variant != RAW if with_vbpe is None else with_vbpe
        if with_vbpe != (self.variant == MERGED) and not self._was_told:
            trained, asked = TOKENS_OF[self.variant], TOKENS_OF[MERGED if with_vbpe else RAW]
            print(
                f"warning: {self.model_path} was trained on {trained}, but gets {asked} now",
                file=sys.stderr,
            )
            self._was_told = True
        return with_vbpe

    def _given_vbpe(self) -> VisualBPE | LegacyVisualBPE:
        if self.vbpe is None:
            raise InputError(
                f"{self.model_path} has no {VBPE_FILE} inside: give vbpe_path, or use plain codes"
            )
        return self.vbpe

    def img2tok(self, images: Sequence[Any], with_vbpe: bool | None = None) -> list[np.ndarray]:
        """Images, as for `img2codes`, to one array of token ids `[n]` int32 per image."""
        return self.codes2tok(self.img2codes(images), with_vbpe)

    def tok2img(self, token_ids: Sequence[np.ndarray | Sequence[int]]) -> list[np.ndarray]:
        """The inverse, up to the VQ-GAN's loss: one array of token ids per image, merged or not, to
        pictures `[H, W, 3]` uint8.

        Raises InputError for ids that do not form an image, or a VQ-GAN without decoder.
        """
        codes = [self._tok2codes(np.asarray(ids)) for ids in token_ids]
        return list(self.vqgan.decode(np.stack(codes))) if codes else []

    def _tok2codes(self, token_ids: np.ndarray) -> np.ndarray:
        ids = self.layout.token_to_image_ids(token_ids)
        has_merges = ids.size and ids.max() >= self.layout.num_vq
        vbpe = self.vbpe if self.vbpe and has_merges else self._without_merges
        return vbpe.decode(ids, *self.vqgan.grid)

    def tokenize(
        self, prompt: Prompt, image: Any = None, with_vbpe: bool | None = None
    ) -> list[int]:
        """The prompt's token ids; `image` is an image, a list of images, or None."""
        images = images_of_entry(image)
        return self.tokenize_with_tokens(prompt, self.img2tok(images, with_vbpe) if images else [])

    def tokenize_with_tokens(self, prompt: Prompt, images: Sequence[np.ndarray]) -> list[int]:
        """As `tokenize`, for images that are already token ids."""
        turns = turns_of(prompt)
        questions = [question.replace(IMAGE_PLACEHOLDER, "").strip() for question, _ in turns]
        if not turns or not all(questions):
            raise InputError("a prompt is empty; write a question")
        if turns[-1][1] is not None or any(answer is None for _, answer in turns[:-1]):
            raise InputError("a chat must have an answer to every question but the last")
        num_characters = sum(map(len, questions)) + sum(len(answer or "") for _, answer in turns)
        if self.context and num_characters > self.context * self.encoder.longest_token:
            raise InputError(  # now, because tokenizing takes 200 times the text's memory
                f"a prompt of {num_characters:,} characters does not fit the model's context of "
                f"{self.context} tokens; shorten it"
            )
        if self._base:
            return self._base.ids(turns, images)
        return build_sequence(turns, images, self.encoder, self.layout, self.template).input_ids

    def position_ids(self, token_ids: Sequence[int]) -> np.ndarray:
        """The position ids of a prompt, int64 `[n]`, as in training."""
        vbpe = self.vbpe or self._without_merges
        return PositionIds(self.image_positions, self.layout, vbpe)(np.array(token_ids))

    # ---- answers ----

    def generate_with_vbpe(
        self,
        prompts: Prompts,
        images: Images = None,
        max_new_tokens: int = 128,
        do_sample: bool = False,
        **options: Any,
    ) -> list[str]:
        """`generate` with merged image tokens."""
        ids = self._prompt_ids(prompts, images, with_vbpe=True)
        return self.answer_token_sequences(ids, max_new_tokens, do_sample=do_sample, **options)

    generate_vq = generate_with_vbpe  # its name in the published code

    def generate(
        self,
        prompts: Prompts,
        images: Images = None,
        max_new_tokens: int = 128,
        do_sample: bool = False,
        with_vbpe: bool | None = None,
        **options: Any,
    ) -> list[str]:
        """Answers to `prompts`, without the prompts. `images` holds one entry per prompt: an image,
        a list of images, or None. `options` are those of `answer_token_sequences`; `with_vbpe` is
        as in `codes2tok`.
        """
        ids = self._prompt_ids(prompts, images, with_vbpe)
        return self.answer_token_sequences(ids, max_new_tokens, do_sample=do_sample, **options)

    def __call__(
        self,
        prompts: Prompt | Prompts,
        images: Any = None,
        max_new_tokens: int = 128,
        **options: Any,
    ) -> str | list[str]:
        """`generate`, also for a single prompt (a text or a chat): then `images` is its image or
        its list of images, and the result is one answer.
        """
        is_one = is_one_prompt(prompts)
        several: Any = [prompts] if is_one else prompts
        answers = self.generate(several, [images] if is_one else images, max_new_tokens, **options)
        return answers[0] if is_one else answers

    def _prompt_ids(
        self, prompts: Prompts, images: Images, with_vbpe: bool | None
    ) -> list[list[int]]:
        """The ids of every prompt; all images are encoded together."""
        pairs = pairs_of(prompts, images)
        together = [image for _, own in pairs for image in own]
        tokens = iter(self.img2tok(together, with_vbpe) if together else [])
        return [
            self.tokenize_with_tokens(prompt, list(itertools.islice(tokens, len(own))))
            for prompt, own in pairs
        ]

    def answer_token_sequences(
        self,
        sequences: Sequence[Sequence[int]],
        max_new_tokens: int,
        on_text: Callable[[str], None] | None = None,
        **options: Any,
    ) -> list[str]:
        """Answers to prompts that are already token ids, in the given order.

        `on_text` is called with each new piece of text as it is generated (one prompt only);
        `options` are those of `continue_token_sequences`.
        """
        if on_text and len(sequences) != 1:
            raise InputError(f"on_text streams one answer, found {len(sequences)} prompts")
        pieces = TextPieces(self.decode_text, self.stop_texts)
        streamer = TextStreamer(pieces, on_text) if on_text else None
        answers = self.continue_token_sequences(
            sequences, max_new_tokens, streamer=streamer, **options
        )
        return [self.decode_answer(ids) for ids in answers]

    def continue_token_sequences(
        self,
        sequences: Sequence[Sequence[int]],
        max_new_tokens: int,
        do_sample: bool = False,
        temperature: float = 1.0,
        batch_size: int = 64,
        on_batch: Callable[[list[int], list[list[int]]], None] | None = None,
        streamer: TextStreamer | None = None,
        **sampling: Any,
    ) -> list[list[int]]:
        """New token ids for every prompt, up to eos (left out), the template's stop text
        (included), or `max_new_tokens`.

        Prompts of similar length share a batch. Where an answer ends, the next prompt takes its
        place; sampled answers and beams wait for the longest of their batch. `on_batch` is called
        with the indices of prompts whose answers have ended and their new token ids.
        `sampling`: transformers' options, such as `top_p=0.9`; `SAMPLING` lists them.
        """
        check_names("generation", sampling, SAMPLING)
        num_beams = sampling.get("num_beams", 1)
        check_positive(temperature=temperature, batch_size=batch_size, num_beams=num_beams)
        self._check_lengths(sequences, max_new_tokens)
        default = sampling_options(temperature) if do_sample else {"do_sample": False}
        options = {"streamer": streamer, **default, **sampling}
        order = reading_order(sequences, self.layout.eoi_id)
        if streamer or do_sample or sampling or getattr(self.model.config, "sliding_window", None):
            ended = self._in_batches(sequences, order, batch_size, max_new_tokens, **options)
        else:
            ended = self._in_turn(sequences, order, batch_size, max_new_tokens)
        answers: dict[int, list[int]] = {}
        for some in ended:
            answers |= some
            if on_batch and some:
                on_batch(list(some), list(some.values()))
        return [answers[index] for index in range(len(sequences))]

    def _in_batches(
        self, sequences: Sequence[Ids], order: list[int], size: int, limit: int, **options: Any
    ) -> Iterator[dict[int, list[int]]]:
        """Answers by index, batch after batch; each ends when all its answers have ended."""
        spells = [StopAtText(self.decode_text, text) for text in self.stop_texts]
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            prompts = [sequences[index] for index in batch]
            try:
                rows = self.continue_batch(prompts, limit, self.stop_ids, options, spells)
            except (ValueError, TypeError, ArithmeticError) as error:
                given = {name: value for name, value in options.items() if name in SAMPLING}
                if not given:
                    raise
                raise InputError(f"transformers refused {given}: {error}") from error
            yield {index: row[: self.end_of(row)] for index, row in zip(batch, rows, strict=True)}

    def _in_turn(
        self, sequences: Sequence[Ids], order: list[int], size: int, limit: int
    ) -> Iterator[dict[int, list[int]]]:
        """Greedy answers by index, as they end."""
        words = {"do_sample": False, **self._words(self.stop_ids)}
        batch = RunningBatch(partial(self.model.generate, **words), self.end_of, limit)
        return continue_in_turn(batch, sequences, order, size, self.inputs_of)

    def _check_lengths(self, sequences: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        check_positive(max_new_tokens=max_new_tokens)
        for sequence in sequences:
            if not len(sequence):
                raise InputError("a prompt has no token ids, expected at least one")
            self.check_length(sequence, max_new_tokens)

    def check_length(self, token_ids: Sequence[int], max_new_tokens: int) -> None:
        """Raises InputError if a prompt and its answer do not fit into the context."""
        num_tokens = int(self.position_ids(token_ids)[-1]) + 1
        if self.context and num_tokens + max_new_tokens > self.context:
            raise InputError(
                f"a prompt of {num_tokens} positions and {max_new_tokens} new ones do not fit the "
                f"model's context of {self.context}; shorten the prompt, use fewer images or "
                "lower max_new_tokens"
            )

    @torch.inference_mode()
    def continue_batch(
        self,
        sequences: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop_ids: Sequence[int],
        options: dict[str, Any],
        criteria: Sequence[EndsRows] = (),
    ) -> list[list[int]]:
        """New token ids for every prompt, up to the end of the longest answer; shorter ones are
        padded. `options` are those of transformers' `generate`.
        """
        # Drawing continues the image itself; beams are copies of the rows, but not of their cache.
        is_alone = "prefix_allowed_tokens_fn" in options or options.get("num_beams", 1) > 1
        inputs = self.inputs_of(sequences, is_alone)
        width = inputs["input_ids"].shape[1]
        for criterion in criteria:
            criterion.width = width
        out = self.model.generate(
            **inputs,
            **self._words(stop_ids),
            max_new_tokens=max_new_tokens,
            stopping_criteria=StoppingCriteriaList(criteria),
            **options,
        )
        return out[:, width:].tolist()

    def inputs_of(self, sequences: Sequence[Ids], is_alone: bool = False) -> dict[str, Any]:
        """The inputs of `generate` for one batch; with `is_alone` no images are shared."""
        eoi_id = None if is_alone else self.layout.eoi_id
        return batch_inputs(self.model, sequences, self.position_ids, self.layout.pad_id, eoi_id)

    def _words(self, stop_ids: Sequence[int]) -> dict[str, Any]:
        """What every call of `generate` gets."""
        # A padded vocabulary has rows without a token; never sample them.
        num_rows = self.model.get_input_embeddings().num_embeddings
        padding_rows = list(range(self.layout.size, num_rows))
        words = {"eos_token_id": list(stop_ids), "pad_token_id": self.layout.pad_id}
        return {**words, "suppress_tokens": padding_rows or None}

    def decode_answer(self, token_ids: Sequence[int]) -> str:
        """The text of an answer's ids, up to the template's stop text, without image tokens and
        specials.
        """
        return cut_at(self.decode_text(token_ids), self.stop_texts)

    def decode_text(self, token_ids: Sequence[int]) -> str:
        """As `decode_answer`, but not cut at the stop text."""
        text_ids = [token for token in token_ids if token < self.layout.num_text]
        return self._tokenizer.decode(text_ids)

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """Texts that end an answer in the model's template, in addition to eos."""
        text = STOP_TEXTS.get(self.template)
        return (text,) if text else ()

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end an answer: eos and, with the base model's template, its own stop tokens."""
        return [self.layout.eos_id, *(self._base.stop_ids if self._base else [])]

    def end_of(self, ids: list[int], seen: int = 0) -> int | None:
        """The length of an answer that has ended, without eos or with the template's stop text; the
        first `seen` ids did not end it.
        """
        stop_ids, stop_texts = self.stop_ids, self.stop_texts
        for number in range(seen, len(ids)):
            if ids[number] in stop_ids:
                return number
            for text in stop_texts:  # each token spells at least one byte
                if text in self.decode_text(ids[max(0, number + 1 - len(text)) : number + 1]):
                    return number + 1
        return None

    # ---- drawing ----

    def draw(
        self,
        prompts: Prompts = ("",),
        images: Images = None,
        with_vbpe: bool | None = None,
        temperature: float = 1.0,
    ) -> list[np.ndarray]:
        """Experimental: sample one picture's token ids `[n]` int32 per prompt, for `tok2img`.

        An empty prompt without images starts as a training sample does: `bos boi`. Otherwise the
        drawing comes where the sample's next image would, after the prompt's images and text.
        Raises InputError for a published vBPE, whose tokens have no fixed shape.
        """
        with_vbpe = self.uses_vbpe(with_vbpe)
        vbpe = self._given_vbpe() if with_vbpe else self._without_merges
        if not isinstance(vbpe, VisualBPE):
            raise InputError(f"{vbpe.source} is published: its tokens have no fixed shape to draw")
        sequences = [before_drawing(self, *pair, with_vbpe) for pair in pairs_of(prompts, images)]
        height, width = self.vqgan.grid
        max_new_tokens = height * width + 1  # one token per cell, and the end
        check_positive(temperature=temperature)
        self._check_lengths(sequences, max_new_tokens)
        return draw_pictures(self, sequences, vbpe, max_new_tokens, temperature)

    @cached_property
    def _tokenizer(self) -> Any:
        return Tokenizer.from_file(str(self.model_path / "tokenizer.json"))
