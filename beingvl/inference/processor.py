"""`AutoProcessor` for model folders of beingvl: images and messages in, `input_ids` out, for stock
`AutoModelForCausalLM.generate`.

    import beingvl                                           # makes it known to AutoProcessor
    processor = AutoProcessor.from_pretrained("stage-3/final")
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True,
                                           return_tensors="pt")
    model.generate(**inputs, max_new_tokens=64)

The folder's chat template builds the text; an image's tokens replace each `<image>`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, BatchFeature
from transformers.processing_utils import ProcessorMixin

from beingvl.data.conversation import IMAGE_PLACEHOLDER
from beingvl.data.made_with import RUNNING
from beingvl.errors import InputError
from beingvl.inference.asked import check_names
from beingvl.inference.base_prompts import with_images
from beingvl.inference.hub import HUB_OPTIONS, fetched
from beingvl.inference.model import BeingVL

OF_AUTO = ("_from_auto", "trust_remote_code", "use_fast")  # AutoProcessor passes them on
ALWAYS = ("padding", "add_special_tokens")  # apply_chat_template's; always padded, never added


class BeingVLProcessor(ProcessorMixin):
    """A model folder's tokenizer together with its VQ-GAN and vBPE; without the model's weights."""

    being: BeingVL

    def __init__(self, tokenizer: Any = None, chat_template: Any = None) -> None:
        super().__init__(tokenizer, chat_template=chat_template)

    @classmethod
    def from_pretrained(
        cls, name: Path | str, vbpe_path: Path | str | None = None, **options: Any
    ) -> BeingVLProcessor:
        """From a model folder, local or on the Hub. Raises InputError as `BeingVL` does."""
        # AutoProcessor and pipelines also pass options that are not for a processor.
        known = HUB_OPTIONS if "_from_auto" in options else options
        asked = {
            key: value for key, value in options.items() if key in known and key not in OF_AUTO
        }
        being = BeingVL(fetched(name, asked, ["vbpe_path"]), vbpe_path)
        tokenizer = AutoTokenizer.from_pretrained(
            being.model_path, padding_side="left", trust_remote_code=False
        )
        processor = cls(tokenizer, tokenizer.chat_template)
        processor.being = being
        return processor

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        return_tensors: str | None = None,
        **options: Any,
    ) -> BatchFeature:
        """`input_ids`, `attention_mask`, and, unless the model was trained on running positions,
        `position_ids`; each `[N, longest]`, padded on the left.

        `text`: output of the chat template, or questions. `images`: for one text its images, for
        several texts a list for each. Raises InputError if images and placeholders do not match.
        `options` that are in ALWAYS are ignored, others refused.
        """
        given = [name for name, value in options.items() if value is not None]
        check_names("the processor", given, ("images", "text", "return_tensors", *ALWAYS))
        texts = [text] if isinstance(text, str) else list(text or [])
        images_of = _images_of(images, len(texts), isinstance(text, str))
        tokens = iter(self.being.img2tok([image for own in images_of for image in own]))
        rows = []
        for question, own in zip(texts, images_of, strict=True):
            prompt = self._prompt(question, len(own))
            ids = self.tokenizer(prompt, add_special_tokens=False).input_ids
            rows.append(with_images(ids, [next(tokens) for _ in own], self.being.layout))
        padded = self.tokenizer.pad({"input_ids": rows})
        if self.being.image_positions != RUNNING:  # stock models count along the sequence
            width = max(map(len, rows), default=0)
            padded["position_ids"] = [
                [0] * (width - len(ids)) + self.being.position_ids(ids).tolist() for ids in rows
            ]
        return BatchFeature(dict(padded), tensor_type=return_tensors)

    def _prompt(self, text: str, num_images: int) -> str:
        """A question in the chat template; a text that already starts with bos, unchanged."""
        if text.startswith(self.being.encoder.special_text(self.being.layout.bos_id)):
            return text
        if num_images == 1 and IMAGE_PLACEHOLDER not in text:
            text = f"{IMAGE_PLACEHOLDER}{text}"
        return self.apply_chat_template([{"role": "user", "content": text}])


def _images_of(images: Any, num_texts: int, is_one: bool) -> list[list[Any]]:
    """The images of each text."""
    if images is None:
        return [[] for _ in range(num_texts)]
    entries = list(images) if isinstance(images, (list, tuple)) else [images]
    if is_one and not any(isinstance(entry, (list, tuple)) for entry in entries):
        entries = [entries]
    if len(entries) != num_texts:
        raise InputError(f"{num_texts} texts and {len(entries)} images; give each text its list")
    return [
        list(entry) if isinstance(entry, (list, tuple)) else [] if entry is None else [entry]
        for entry in entries
    ]
