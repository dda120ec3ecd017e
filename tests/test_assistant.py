"""The same question gets the same answer: alone, in a batch, streamed, in a conversation, from stock transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mipha.assistant import Assistant, load
from mipha.data.sample import IMAGE, Message
from mipha.models.build import save_checkpoint

QUESTIONS = (
    "Which colour?",
    "Is it a circle, a square or a triangle? Look well before you say it.",
    "yes or no",
    "left or right in the picture?",
)
TOKENS = 12


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(3)
    for number in range(3):
        # Not noise, which averages out: blocks of strong colours.
        blocks = random.integers(0, 2, (3, 3, 3), dtype=np.uint8) * 255
        Image.fromarray(blocks.repeat(9, 0).repeat(8 + number, 1)).save(folder / f"{number}.png")
    return [folder / f"{number}.png" for number in range(3)]


@pytest.fixture(scope="module")
def assistants(tiny_model: Callable) -> Callable[..., Assistant]:
    made: dict[tuple, Assistant] = {}

    def assistant(family: str = "llama", template: str = "chatml") -> Assistant:
        if (family, template) not in made:
            made[family, template] = Assistant(*tiny_model(family, chat_template=template))
        return made[family, template]

    return assistant


def greedy(assistant: Assistant, messages: list[Message], image: Path | None, tokens: int = TOKENS) -> str:
    """A plain `generate` of the host with the host's processor: no cache kept, no padding, nothing of ours."""
    content = [[{"type": "text", "text": part} for part in message.text.split(f"{IMAGE}\n") if part] for message in messages]
    for parts, message in zip(content, messages, strict=True):
        if IMAGE in message.text:
            parts.insert(0, {"type": "image", "path": str(image)})
    chat = [{"role": message.role, "content": parts} for message, parts in zip(messages, content, strict=True)]
    inputs = assistant.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    out = assistant.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return assistant.processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("template", ["chatml", "vicuna"])
def test_a_batch_answers_as_one_does_and_as_stock_generate_does(
    assistants: Callable, family: str, template: str, pictures: list[Path]
) -> None:
    """Mixed lengths, several images, one image asked about again and again, and no image at all."""
    assistant = assistants(family, template)
    pairs = [(pictures[i % 3] if i % 4 else None, QUESTIONS[i % 4] + " Sure?" * (i // 4)) for i in range(9)]
    pairs += [(pictures[1], question) for question in QUESTIONS]
    together = assistant.answer_many(pairs, max_new_tokens=TOKENS)
    for (image, question), answer in zip(pairs, together, strict=True):
        assert assistant.answer(image, question, max_new_tokens=TOKENS) == answer
        assert greedy(assistant, [Message("user", f"{IMAGE}\n{question}" if image else question)], image) == answer.text
    assert len({answer.text for answer in together}) >= 3, "a model that says one thing tests nothing"


def test_the_image_changes_the_answer(assistants: Callable, pictures: list[Path]) -> None:
    answers = {assistants().answer(picture, QUESTIONS[1], max_new_tokens=TOKENS).text for picture in pictures}
    assert len(answers) > 1


@pytest.mark.parametrize("batch_size", [1, 2, 3, 50])
def test_the_size_of_a_batch_does_not_matter(assistants: Callable, pictures: list[Path], batch_size: int) -> None:
    pairs = [(picture, question) for question in QUESTIONS for picture in (*pictures, None)]
    wanted = [assistants().answer(*pair, max_new_tokens=TOKENS) for pair in pairs]
    told: dict[int, str] = {}

    def on_answers(positions: list[int], answers: list) -> None:
        assert len(positions) <= batch_size
        told.update({position: answer.text for position, answer in zip(positions, answers, strict=True)})

    assert assistants().answer_many(pairs, max_new_tokens=TOKENS, batch_size=batch_size, on_answers=on_answers) == wanted
    assert told == {position: answer.text for position, answer in enumerate(wanted)}


def test_an_image_is_encoded_once_in_a_batch(assistants: Callable, pictures: list[Path]) -> None:
    assistant = assistants()
    sizes = []
    hook = assistant.model.model.vision_tower.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    try:
        assistant.answer_many([(pictures[i % 2], question) for question in QUESTIONS for i in range(4)], max_new_tokens=2)
    finally:
        hook.remove()
    assert sizes == [2]


def test_paths_bytes_pictures_and_arrays_are_one_image(assistants: Callable, pictures: list[Path]) -> None:
    path = pictures[0]
    with Image.open(path) as opened:
        opened.load()
        forms = [path, str(path), path.read_bytes(), opened, np.asarray(opened)]
    answers = assistants().answer_many([(form, QUESTIONS[1]) for form in forms], max_new_tokens=TOKENS)
    assert len(set(answers)) == 1
    assert {assistants().answer(form, QUESTIONS[1], max_new_tokens=TOKENS) for form in forms} == set(answers)


def test_a_transparent_picture_is_read_as_its_file_is(assistants: Callable, tmp_path: Path) -> None:
    picture = Image.new("RGBA", (28, 28), (200, 0, 0, 90))
    picture.save(tmp_path / "a.png")
    assert torch.equal(assistants().pixels(picture), assistants().pixels(tmp_path / "a.png"))


def test_an_answer_says_how_it_ended(assistants: Callable, pictures: list[Path]) -> None:
    assistant = assistants()
    cut = assistant.answer(pictures[0], QUESTIONS[0], max_new_tokens=3)
    assert (cut.num_tokens, cut.finished) == (3, False)
    head, end = assistant.model.lm_head, assistant.processor.tokenizer.eos_token_id
    try:  # a head that says nothing but the end of the turn
        assistant.model.lm_head = torch.nn.Linear(head.in_features, head.out_features)
        torch.nn.init.zeros_(assistant.model.lm_head.weight)
        torch.nn.init.zeros_(assistant.model.lm_head.bias)
        assistant.model.lm_head.bias.data[end] = 1.0
        ended = assistant.answer(pictures[0], QUESTIONS[0], max_new_tokens=3)
    finally:
        assistant.model.lm_head = head
    assert (ended.text, ended.num_tokens, ended.finished) == ("", 1, True)


@pytest.mark.parametrize("template", ["chatml", "vicuna"])
def test_the_pieces_of_a_stream_are_the_answer(assistants: Callable, family: str, template: str, pictures: list[Path]) -> None:
    assistant = assistants(family, template)
    for image in (pictures[0], None):
        pieces = list(assistant.stream(image, QUESTIONS[0], max_new_tokens=TOKENS))
        assert "".join(pieces).strip() == assistant.answer(image, QUESTIONS[0], max_new_tokens=TOKENS).text


@pytest.mark.parametrize("template", ["chatml", "vicuna"])
def test_a_conversation_is_its_whole_prompt(assistants: Callable, family: str, template: str, pictures: list[Path]) -> None:
    """What the cache keeps from turn to turn changes no answer."""
    assistant = assistants(family, template)
    for image in (pictures[0], None):
        chat = assistant.chat(image)
        messages: list[Message] = []
        for question in QUESTIONS[:3]:
            said = "".join(chat.ask(question, max_new_tokens=6)).strip()
            messages.append(Message("user", f"{IMAGE}\n{question}" if image and not messages else question))
            assert greedy(assistant, messages, image, tokens=6) == said
            messages.append(Message("assistant", said))
            assert chat.messages == messages


def test_a_turn_costs_its_new_tokens_only(assistants: Callable, pictures: list[Path]) -> None:
    assistant = assistants()
    chat = assistant.chat(pictures[0])
    lengths: list[int] = []
    images: list[int] = []
    body, tower = assistant.model.model.language_model, assistant.model.model.vision_tower
    hooks = [
        body.register_forward_pre_hook(lambda _, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True),
        tower.register_forward_pre_hook(lambda *_: images.append(1)),
    ]
    try:
        for _ in chat.ask(QUESTIONS[1], max_new_tokens=4):
            pass
        first = max(lengths)
        lengths.clear()
        for _ in chat.ask("yes or no", max_new_tokens=4):
            pass
    finally:
        for hook in hooks:
            hook.remove()
    whole = len(assistant.prompt_ids(chat.messages[:-1]))
    assert first > 30 and whole > first + 10
    assert max(lengths) <= whole - first
    assert len(images) == 1, "the image is encoded once"


def test_a_reader_who_leaves_breaks_nothing(assistants: Callable, pictures: list[Path]) -> None:
    """An answer that was not read to its end never was part of the conversation, and its making stops."""
    assistant = assistants()
    chat, fresh = assistant.chat(pictures[0]), assistant.chat(pictures[0])
    for wanted in (1, 2):
        reader = chat.ask(QUESTIONS[1], max_new_tokens=200)
        for _ in range(wanted):
            next(reader)
        reader.close()
        assert chat.messages == []
    for question in QUESTIONS[:2]:
        assert list(chat.ask(question, max_new_tokens=6)) == list(fresh.ask(question, max_new_tokens=6))
    reader = chat.ask(QUESTIONS[3], max_new_tokens=200)
    next(reader)
    reader.close()
    assert len(chat.messages) == 4
    assert list(chat.ask("yes?", max_new_tokens=6)) == list(fresh.ask("yes?", max_new_tokens=6))


def test_an_error_while_answering_reaches_the_reader(assistants: Callable, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        assistants().answer(tmp_path / "gone.png", "What?")
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        list(assistants().stream(tmp_path / "gone.png", "What?"))
    with pytest.raises(ValueError, match="holds <image>: leave it out"):
        assistants().answer(None, "What is <image>?")
    with pytest.raises(ValueError, match="holds <image>: leave it out"):
        list(assistants().stream(None, "What is <image>?"))


def test_an_error_inside_generate_reaches_the_reader(assistants: Callable, pictures: list[Path]) -> None:
    assistant = assistants()

    def fail(*_: object) -> None:
        raise RuntimeError("no memory")

    chat = assistant.chat(pictures[0])
    hook = assistant.model.model.language_model.register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="no memory"):
            list(chat.ask("What?"))
    finally:
        hook.remove()
    assert chat.messages == []
    said = "".join(chat.ask("What?", max_new_tokens=5)).strip()
    assert said == assistant.answer(pictures[0], "What?", max_new_tokens=5).text


def test_load_takes_a_checkpoint_folder(tiny_model: Callable, assistants: Callable, tmp_path: Path, pictures: list[Path]) -> None:
    save_checkpoint(*tiny_model("phi"), tmp_path / "model")
    loaded = load(tmp_path / "model", device="cpu")
    wanted = assistants("phi").answer(pictures[0], QUESTIONS[0], max_new_tokens=TOKENS)
    assert loaded.answer(pictures[0], QUESTIONS[0], max_new_tokens=TOKENS) == wanted
    with pytest.raises(ValueError, match=r"is neither a run .* nor a whole model"):
        load(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("name: x\n")
    with pytest.raises(FileNotFoundError, match="has not finished finetune"):
        load(tmp_path / "run")
