"""A model for lmms-eval, found through the entry point `lmms_eval.models`:

    python -m lmms_eval --model mipha --model_args pretrained=runs/quickstart --tasks mme

Source: EvolvingLMMs-Lab/lmms-eval 0.7 `docs/model_guide.md`, `lmms_eval/api/task.py` (a chat
    request has six arguments).
"""

from __future__ import annotations

from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

from mipha.assistant import load
from mipha.data.sample import IMAGE

manifest = ModelManifest(model_id="mipha", chat_class_path="mipha.integrations.lmms_eval.Mipha")


class Mipha(lmms):
    """A model that answers through `mipha.Assistant`: greedy, one turn, any number of images."""

    is_simple = False

    def __init__(
        self, pretrained: str, device: str | None = None, batch_size: int | str = 16, **kwargs: Any
    ) -> None:
        """Load a run or a model folder.

        Raises:
            ValueError: An argument that would be ignored.
        """
        super().__init__()
        if kwargs:
            raise ValueError(
                "mipha takes pretrained, device and batch_size as model arguments, not "
                f"{', '.join(kwargs)}: leave them out"
            )
        self.assistant = load(pretrained, device=device)
        self.batch_size = int(batch_size)

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Return answers in the order of the requests.

        Raises:
            ValueError: A request has several turns, a video or sound, or asks for sampling.
        """
        # Requests with the same limits are asked together.
        pairs = [self._pair(*request.args) for request in requests]
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for place, (_, max_new_tokens, until) in enumerate(pairs):
            groups.setdefault((max_new_tokens, until), []).append(place)

        texts: list[str] = [""] * len(requests)
        bar = tqdm(total=len(requests), desc="mipha", disable=self.rank != 0)
        for (max_new_tokens, until), places in groups.items():
            asked = [pairs[place][0] for place in places]
            answers = self.assistant.answer_many(
                asked,
                max_new_tokens=max_new_tokens,
                batch_size=self.batch_size,
                on_answers=lambda found, _: bar.update(len(found)),
            )

            for place, answer in zip(places, answers, strict=True):
                texts[place] = _cut(answer.text, until)
                context, _, options = requests[place].args[:3]
                self.cache_hook.add_partial("generate_until", (context, options), texts[place])
        bar.close()
        return texts

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Refuse: the protocols that mipha reproduces read generated text."""
        raise NotImplementedError(
            "mipha answers by generation: choose a task with output_type generate_until"
        )

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Refuse: a question is one turn."""
        raise NotImplementedError(
            "mipha answers single turns here: choose a task with output_type generate_until"
        )

    def _pair(
        self,
        context: str,
        to_messages: Any,
        options: dict[str, Any],
        doc_id: int,
        task: str,
        split: str,
    ) -> Any:
        if options.get("do_sample") and options.get("temperature"):
            raise ValueError(
                f"task {task} asks for sampling (temperature {options['temperature']}), "
                "mipha answers greedily: set it to 0"
            )

        messages = ChatMessages(messages=to_messages(self.task_dict[task][split][doc_id]))
        images, videos, audios = messages.extract_media()
        if videos or audios or len(messages.messages) > 1:
            raise ValueError(
                f"task {task} document {doc_id} is more than images and one turn, "
                "which this model cannot read: choose another task"
            )

        # One image stands in front of the text, as in training; several stand where the task has
        # them.
        text = "\n".join(
            content.text if content.type == "text" else IMAGE
            for content in messages.messages[0].content
            if content.type == "text" or len(images) > 1
        )
        until = options.get("until") or ()
        return (
            (images, text),
            int(options.get("max_new_tokens", 128)),
            (until,) if isinstance(until, str) else tuple(until),
        )


def _cut(text: str, until: tuple[str, ...]) -> str:
    """Return the text before the first stop string."""
    ends = [text.index(stop) for stop in until if stop and stop in text]
    return text[: min(ends)] if ends else text
