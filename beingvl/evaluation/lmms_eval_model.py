"""Being-VL as a model for lmms-eval, which finds it through this package's entry point in the group
`lmms_eval.models`.

    lmms-eval --model beingvl --model_args pretrained=stage-3/final,vbpe_path=vbpe.json --tasks
    pope,mme --batch_size 16

This package does not depend on lmms-eval: only lmms-eval imports this file, and only this file
imports lmms-eval. lmms_eval_requests.py does the work.
"""

from __future__ import annotations

from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from tqdm import tqdm

from beingvl.evaluation.lmms_eval_requests import Question, answer_questions, as_flag, open_model


def manifest() -> ModelManifest:
    """The entry point for lmms-eval's registry."""
    return ModelManifest(model_id="beingvl", simple_class_path=f"{__name__}.LmmsEvalModel")


class LmmsEvalModel(lmms):
    """`--model_args pretrained=FOLDER[,vbpe_path=FILE][,raw=True][,template=NAME]
    [,torch_dtype=float32]`.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        vbpe_path: str | None = None,
        raw: bool | str = False,
        template: str | None = None,
        torch_dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self._model, self.device = open_model(pretrained, vbpe_path, torch_dtype, device, template)
        self._with_vbpe = False if as_flag(raw) else None
        self._batch_size = int(batch_size)

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Answers to lmms-eval's requests; their images come from the task's documents."""
        asked = []
        for request in requests:
            context, options, doc_to_visual, doc_id, task, split = request.args
            visuals = doc_to_visual(self.task_dict[task][split][doc_id])
            images = visuals if isinstance(visuals, list) else [visuals]
            asked.append(Question(context, images, options))
        is_quiet = None if self.rank == 0 else True  # None: show a bar only on a terminal
        with tqdm(total=len(asked), disable=is_quiet, desc="beingvl", unit="question") as bar:
            answers = answer_questions(
                self._model, asked, self._batch_size, self._with_vbpe, bar.update
            )
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args[:2], answer)
        return answers

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        raise NotImplementedError(
            "beingvl answers by generating; choose a task with output_type generate_until"
        )

    def generate_until_multi_round(self, requests: list[Any]) -> list[Any]:
        raise NotImplementedError(
            "beingvl answers one round; choose a task with output_type generate_until"
        )
