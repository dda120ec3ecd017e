"""The same question gets the same answer: alone, in a batch, streamed, and in transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mipha.assistant import Assistant, load
from mipha.data.sample import IMAGE, Message
from mipha.models.build import save_checkpoint
from mipha.models.decoding import Sampling
from mipha.models.features import ImageFeatures
from mipha.recipe import load_recipe
from mipha.run import create_run

QUESTIONS = (
    "Which colour?",
    "Is it a circle, a square or a triangle? Look well before you say it.",
    "yes or no",
    "left or right in the picture?",
)
TOKENS = 12


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("files")
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


def greedy(
    assistant: Assistant,
    messages: list[Message],
    image: Path | tuple[Path, ...] | None,
    tokens: int = TOKENS,
) -> str:
    """Answer with transformers alone: its `generate` and processor, no kept cache, no padding."""
    content = [
        [{"type": "text", "text": part} for part in message.text.split(f"{IMAGE}\n") if part]
        for message in messages
    ]
    for parts, message in zip(content, messages, strict=True):
        if IMAGE in message.text:
            shown = image if isinstance(image, tuple) else (image,)
            parts[:0] = [{"type": "image", "path": str(one)} for one in shown]
    chat = [
        {"role": message.role, "content": parts}
        for message, parts in zip(messages, content, strict=True)
    ]
    inputs = assistant.processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    out = assistant.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return assistant.processor.decode(
        out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    ).strip()


@pytest.mark.parametrize("template", ["chatml", "vicuna"])
def test_a_batch_answers_as_one_does_and_as_stock_generate_does(
    assistants: Callable, family: str, template: str, files: list[Path]
) -> None:
    """Mixed lengths, several images, one image asked about again and again, and no image at all."""
    assistant = assistants(family, template)
    pairs = [
        (files[i % 3] if i % 4 else None, QUESTIONS[i % 4] + " Sure?" * (i // 4)) for i in range(9)
    ]
    pairs += [(files[1], question) for question in QUESTIONS]
    together = assistant.answer_many(pairs, max_new_tokens=TOKENS)
    for (image, question), answer in zip(pairs, together, strict=True):
        assert assistant.answer(image, question, max_new_tokens=TOKENS) == answer
        assert (
            greedy(
                assistant, [Message("user", f"{IMAGE}\n{question}" if image else question)], image
            )
            == answer.text
        )
    assert len({answer.text for answer in together}) >= 3, (
        "a model that says one thing tests nothing"
    )


def test_several_images_are_shown_in_front_of_a_question(
    assistants: Callable, files: list[Path]
) -> None:
    """As many as a question has, whatever stands beside it in the batch, as stock generate does."""
    assistant = assistants()
    shown = [(files[0], files[1]), (files[1], files[0]), files[0], None, tuple(files), (files[2],)]
    pairs = [(images, question) for question in QUESTIONS for images in shown]
    together = assistant.answer_many(pairs, max_new_tokens=TOKENS)
    for (images, question), answer in zip(pairs, together, strict=True):
        assert assistant.answer(images, question, max_new_tokens=TOKENS) == answer
        num = len(images) if isinstance(images, tuple) else int(images is not None)
        message = Message("user", f"{IMAGE}\n" * num + question)
        assert greedy(assistant, [message], images) == answer.text
    assert together[0] != together[1] and together[0] != together[2], "the images must matter"


def test_more_images_than_the_model_reads_are_refused(
    assistants: Callable, files: list[Path]
) -> None:
    assistant = assistants()
    longest = assistant.model.config.get_text_config().max_position_embeddings
    with pytest.raises(ValueError, match=rf"tokens with its {longest} images .* reads {longest:,}"):
        assistant.answer((files[0],) * longest, QUESTIONS[0])


def test_likelihoods_are_those_of_the_stock_class(
    assistants: Callable, family: str, tmp_path: Path
) -> None:
    """Of a continuation, of a text without a context, and of one read in windows."""
    assistant = assistants(family)
    tokenizer = assistant.processor.tokenizer
    long = " ".join(f"word {number} stands here." for number in range(9))
    texts = [
        ("Question: why?\nAnswer:", " Because it is red."),
        ("", "Red is a colour."),
        ("", long),
    ]
    found = assistant.log_likelihoods(texts, window=16)

    for (context, text), (value, num) in zip(texts, found, strict=True):
        before = tokenizer(context)["input_ids"] if context else []
        ids = tokenizer(context + text)["input_ids"]
        if not before:
            first = tokenizer.bos_token_id
            first = tokenizer.eos_token_id if first is None else first
            ids = ids if ids[0] == first else [first, *ids]
            before = ids[:1]
        assert num == len(ids) - len(before)

        # Token by token: a window sees the last token of the one before, the first its context.
        wanted = 0.0
        for place in range(len(before), len(ids)):
            first_place = len(before) + (place - len(before)) // 16 * 16
            begin = first_place - 1
            if first_place == len(before):
                begin = max(0, min(first_place + 16, len(ids)) - 1 - 16)
            with torch.inference_mode():
                logits = assistant.model(input_ids=torch.tensor([ids[begin:place]])).logits[0, -1]
            wanted += logits.log_softmax(-1)[ids[place]].item()
        assert value == pytest.approx(wanted, abs=1e-3)
    assert found[2][1] > 32, "two windows and a part of one"


def test_the_image_changes_the_answer(assistants: Callable, files: list[Path]) -> None:
    answers = {
        assistants().answer(file, QUESTIONS[1], max_new_tokens=TOKENS).text for file in files
    }
    assert len(answers) > 1


@pytest.mark.parametrize("batch_size", [1, 2, 3, 50])
def test_the_size_of_a_batch_does_not_matter(
    assistants: Callable, files: list[Path], batch_size: int
) -> None:
    pairs = [(file, question) for question in QUESTIONS for file in (*files, None)]
    wanted = [assistants().answer(*pair, max_new_tokens=TOKENS) for pair in pairs]
    told: dict[int, str] = {}

    def on_answers(positions: list[int], answers: list) -> None:
        assert len(positions) <= batch_size
        told.update(
            {position: answer.text for position, answer in zip(positions, answers, strict=True)}
        )

    assert (
        assistants().answer_many(
            pairs, max_new_tokens=TOKENS, batch_size=batch_size, on_answers=on_answers
        )
        == wanted
    )
    assert told == {position: answer.text for position, answer in enumerate(wanted)}


def test_an_image_is_encoded_once_in_a_batch(assistants: Callable, files: list[Path]) -> None:
    assistant = assistants()
    sizes = []
    hook = assistant.model.model.vision_tower.register_forward_pre_hook(
        lambda _, args: sizes.append(len(args[0]))
    )
    try:
        assistant.answer_many(
            [(files[i % 2], question) for question in QUESTIONS for i in range(4)],
            max_new_tokens=2,
        )
    finally:
        hook.remove()
    assert sizes == [2]


def test_paths_bytes_pil_images_and_arrays_are_one_image(
    assistants: Callable, files: list[Path]
) -> None:
    path = files[0]
    with Image.open(path) as opened:
        opened.load()
        forms = [path, str(path), path.read_bytes(), opened, np.asarray(opened)]
    answers = assistants().answer_many(
        [(form, QUESTIONS[1]) for form in forms], max_new_tokens=TOKENS
    )
    assert len(set(answers)) == 1
    assert {
        assistants().answer(form, QUESTIONS[1], max_new_tokens=TOKENS) for form in forms
    } == set(answers)


def test_a_transparent_image_is_read_like_its_file(assistants: Callable, tmp_path: Path) -> None:
    file = Image.new("RGBA", (28, 28), (200, 0, 0, 90))
    file.save(tmp_path / "a.png")
    assert torch.equal(assistants().pixels(file), assistants().pixels(tmp_path / "a.png"))


def test_a_rotated_image_is_the_same_in_every_form(
    assistants: Callable, files: list[Path], tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(files[2]) as opened:
        opened.save(tmp_path / "a.png", exif=exif)
        upright = opened.transpose(Image.Transpose.ROTATE_270)
    with Image.open(tmp_path / "a.png") as rotated:
        rotated.load()
    for form in (tmp_path / "a.png", (tmp_path / "a.png").read_bytes(), rotated):
        assert torch.equal(assistants().pixels(form), assistants().pixels(upright))
    assert not torch.equal(assistants().pixels(rotated), assistants().pixels(files[2]))


def test_an_encoded_image_is_asked_about_as_the_image_is_and_passes_the_tower_once(
    assistants: Callable, files: list[Path]
) -> None:
    assistant = assistants()
    pairs = [(file, question) for question in QUESTIONS for file in files[:2]]
    wanted = assistant.answer_many(pairs, max_new_tokens=TOKENS)

    assistant.features = ImageFeatures(assistant.model)  # nothing seen by other tests
    images: list[int] = []
    hook = assistant.model.model.vision_tower.register_forward_pre_hook(
        lambda _, args: images.append(len(args[0]))
    )
    try:
        encoded = assistant.encode_image(files[0])
        assert assistant.encode_image(encoded) is encoded
        asked = [(encoded if image == files[0] else image, text) for image, text in pairs]
        mixed = assistant.answer_many(asked, max_new_tokens=TOKENS)
        alone = [assistant.answer(encoded, text, max_new_tokens=TOKENS) for text in QUESTIONS]
        streamed = list(assistant.stream(encoded, QUESTIONS[0], max_new_tokens=TOKENS))
        turn = [Message("user", f"{IMAGE}\n{QUESTIONS[1]}")]
        prompted = assistant.generate([assistant.prompt(turn, [encoded], max_new_tokens=TOKENS)])
    finally:
        hook.remove()
    assert images == [1, 1], "the tower sees the first image in encode_image, the other in a batch"
    assert mixed == wanted
    assert alone == wanted[::2]
    assert "".join(streamed) == wanted[0].text
    assert prompted == [wanted[2]]


def test_an_answer_says_how_it_ended(assistants: Callable, files: list[Path]) -> None:
    assistant = assistants()
    cut = assistant.answer(files[0], QUESTIONS[0], max_new_tokens=3)
    assert (cut.num_tokens, cut.finished) == (3, False)
    head, end = assistant.model.lm_head, assistant.processor.tokenizer.eos_token_id
    try:  # a head that says nothing but the end of the turn
        assistant.model.lm_head = torch.nn.Linear(head.in_features, head.out_features)
        torch.nn.init.zeros_(assistant.model.lm_head.weight)
        torch.nn.init.zeros_(assistant.model.lm_head.bias)
        assistant.model.lm_head.bias.data[end] = 1.0
        ended = assistant.answer(files[0], QUESTIONS[0], max_new_tokens=3)
    finally:
        assistant.model.lm_head = head
    assert (ended.text, ended.num_tokens, ended.finished) == ("", 1, True)


@pytest.mark.parametrize("template", ["chatml", "vicuna"])
def test_the_pieces_of_a_stream_are_the_answer(
    assistants: Callable, family: str, template: str, files: list[Path]
) -> None:
    assistant = assistants(family, template)
    for image in (files[0], None):
        pieces = list(assistant.stream(image, QUESTIONS[0], max_new_tokens=TOKENS))
        assert (
            "".join(pieces).strip()
            == assistant.answer(image, QUESTIONS[0], max_new_tokens=TOKENS).text
        )


@pytest.mark.parametrize("template", ["chatml", "vicuna"])
def test_a_conversation_is_its_whole_prompt(
    assistants: Callable, family: str, template: str, files: list[Path]
) -> None:
    """The cache that is kept from turn to turn changes no answer."""
    assistant = assistants(family, template)
    for image in (files[0], None):
        chat = assistant.chat(image)
        messages: list[Message] = []
        for question in QUESTIONS[:3]:
            said = "".join(chat.ask(question, max_new_tokens=6)).strip()
            messages.append(
                Message("user", f"{IMAGE}\n{question}" if image and not messages else question)
            )
            assert greedy(assistant, messages, image, tokens=6) == said
            messages.append(Message("assistant", said))
            assert chat.messages == messages


def test_a_turn_costs_its_new_tokens_only(assistants: Callable, files: list[Path]) -> None:
    assistant = assistants()
    assistant.features = ImageFeatures(assistant.model)  # nothing seen by other tests
    chat = assistant.chat(files[0])
    lengths: list[int] = []
    images: list[int] = []
    body, tower = assistant.model.model.language_model, assistant.model.model.vision_tower
    hooks = [
        body.register_forward_pre_hook(
            lambda _, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]),
            with_kwargs=True,
        ),
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


def conversations(files: list[Path]) -> list[tuple[list[Message], list[Path], int]]:
    """Return (messages, images, longest answer) with several turns, several images, and none."""
    first = Message("user", f"{IMAGE}\n{QUESTIONS[0]}")
    return [
        ([first], [files[0]], 3),
        (
            [
                Message("system", "Be brief."),
                first,
                Message("assistant", "red"),
                Message("user", QUESTIONS[1]),
            ],
            [files[1]],
            12,
        ),
        ([Message("user", QUESTIONS[2])], [], 7),
        ([Message("user", f"{IMAGE}\n{IMAGE}\nSame?")], [files[0], files[2]], 12),
        (
            [first, Message("assistant", "a"), Message("user", f"{IMAGE}\nAnd this?")],
            [files[2], files[2]],
            9,
        ),
    ]


@pytest.mark.parametrize("template", ["chatml", "vicuna"])
def test_conversations_in_a_batch_are_answered_as_alone_and_as_stock_generate_does(
    assistants: Callable, family: str, template: str, files: list[Path]
) -> None:
    assistant = assistants(family, template)
    told: list[list[int]] = [[] for _ in range(5)]

    def on_tokens(tokens: list[int | None]) -> tuple[int, ...]:
        for row, token in enumerate(tokens):
            told[row] += [] if token is None else [token]
        return ()

    asked = conversations(files)
    prompts = [
        assistant.prompt(messages, images, max_new_tokens=most) for messages, images, most in asked
    ]
    together = assistant.generate(prompts, on_tokens)
    for prompt, answer, tokens, (messages, images, most) in zip(
        prompts, together, told, asked, strict=True
    ):
        assert assistant.generate([prompt]) == [answer]
        assert len(tokens) == answer.num_tokens <= most
        assert answer.finished or answer.num_tokens == most
        ended = tokens[:-1] if answer.finished else tokens
        assert (
            assistant.processor.tokenizer.decode(ended, skip_special_tokens=True).strip()
            == answer.text
        )
        if len(images) <= 1:
            assert (
                greedy(assistant, messages, images[0] if images else None, tokens=most)
                == answer.text
            )
    assert assistant.generate(prompts[::-1]) == together[::-1]


def test_an_answer_that_is_drawn_is_its_seeds_own_in_any_batch(
    assistants: Callable, files: list[Path]
) -> None:
    assistant = assistants()
    prompt = [assistant.prompt(m, i, max_new_tokens=TOKENS) for m, i, _ in conversations(files)]
    drawn = [
        assistant.prompt(
            *conversations(files)[0][:2],
            max_new_tokens=TOKENS,
            sampling=Sampling(1.5, seed=seed),
        )
        for seed in range(6)
    ]
    alone = [assistant.generate([one])[0] for one in [*prompt, *drawn]]
    assert assistant.generate([*prompt, *drawn]) == alone
    assert len({answer.text for answer in alone[-6:]}) > 3, "seeds differ"
    unseeded = assistant.prompt(
        *conversations(files)[0][:2], max_new_tokens=TOKENS, sampling=Sampling(1.5)
    )
    assert len({assistant.generate([unseeded])[0].text for _ in range(6)}) > 3
    nearly_greedy = [Sampling(1e-4, seed=1), Sampling(1.5, top_p=1e-6, seed=1)]
    for sampling in nearly_greedy:
        messages, images, most = conversations(files)[1]
        assert (
            assistant.generate(
                [assistant.prompt(messages, images, max_new_tokens=most, sampling=sampling)]
            )[0]
            == alone[1]
        )


def test_a_row_that_is_told_to_leave_ends_and_the_others_go_on(
    assistants: Callable, files: list[Path]
) -> None:
    assistant = assistants()
    prompts = [
        assistant.prompt(messages, images, max_new_tokens=TOKENS)
        for messages, images, _ in conversations(files)[:3]
    ]
    whole = assistant.generate(prompts)
    assert whole[1].num_tokens > 2
    steps: list[list[int | None]] = []

    def on_tokens(tokens: list[int | None]) -> list[int]:
        steps.append(tokens)
        return [1] if len(steps) == 2 else []

    left = assistant.generate(prompts, on_tokens)
    assert (left[0], left[2]) == (whole[0], whole[2])
    assert (left[1].num_tokens, left[1].finished) == (2, False)
    assert all(step[1] is None for step in steps[2:]) and len(steps) == max(
        whole[0].num_tokens, whole[2].num_tokens
    )


def test_a_batch_beyond_the_window_is_answered_one_by_one(
    tiny_model: Callable, files: list[Path]
) -> None:
    """Padding would stand inside a sliding window; tokens are still reported as in a batch."""
    model, processor = tiny_model("llama")
    assistant = Assistant(model, processor)
    prompts = [
        assistant.prompt(messages, images, max_new_tokens=most)
        for messages, images, most in conversations(files)[:3]
    ]
    wanted = [assistant.generate([prompt])[0] for prompt in prompts]
    widths: list[int] = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    model.config.text_config.sliding_window = (
        32  # smaller than the longest: only the grouping is looked at, this family does not slide
    )
    told: list[list[int]] = [[], [], []]

    def on_tokens(tokens: list[int | None]) -> list[int]:
        for row, token in enumerate(tokens):
            told[row] += [] if token is None else [token]
        return [row for row in (1,) if len(told[row]) == 2]

    try:
        answers = assistant.generate(prompts, on_tokens)
    finally:
        hook.remove()
    assert set(widths) == {1}
    assert [answers[0], answers[2]] == [wanted[0], wanted[2]]
    assert [len(tokens) for tokens in told] == [wanted[0].num_tokens, 2, wanted[2].num_tokens]


def test_an_image_seen_lately_is_not_encoded_again(assistants: Callable, files: list[Path]) -> None:
    assistant = assistants()
    assistant.features = ImageFeatures(assistant.model)
    turns = [Message("user", f"{IMAGE}\n{QUESTIONS[0]}")]
    for file in (files[0], files[0].read_bytes(), files[1], files[0]):
        assistant.generate([assistant.prompt(turns, [file], max_new_tokens=2)])
    list(assistant.stream(files[1], QUESTIONS[1], max_new_tokens=2))
    assert (assistant.features.num_encoded, assistant.features.num_found) == (2, 3)
    one = assistant.features.num_bytes // 2
    assistant.features = ImageFeatures(assistant.model, max_bytes=2 * one)
    pixels = [assistant.image_inputs(file) for file in files]
    first = assistant.features.of(pixels)
    assert assistant.features.num_bytes == 2 * one, "the oldest of three was given up"
    # Encoded alone, and not with two others: equal but for the order of sums.
    torch.testing.assert_close(assistant.features.of(pixels), first)
    with pytest.raises(ValueError, match="1 <image> markers for 0 images"):
        assistant.prompt(turns)


def test_a_reader_who_leaves_breaks_nothing(assistants: Callable, files: list[Path]) -> None:
    """A partly read answer does not enter the conversation, and its generation stops."""
    assistant = assistants()
    chat, fresh = assistant.chat(files[0]), assistant.chat(files[0])
    for wanted in (1, 2):
        reader = chat.ask(QUESTIONS[1], max_new_tokens=200)
        for _ in range(wanted):
            next(reader)
        reader.close()
        assert chat.messages == []
    for question in QUESTIONS[:2]:
        assert list(chat.ask(question, max_new_tokens=6)) == list(
            fresh.ask(question, max_new_tokens=6)
        )
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
    with pytest.raises(ValueError, match="holds 1 <image> markers for 0 images: leave"):
        assistants().answer(None, "What is <image>?")
    with pytest.raises(ValueError, match="holds 1 <image> markers for 0 images: leave"):
        list(assistants().stream(None, "What is <image>?"))


def test_what_no_model_reads_is_refused(assistants: Callable) -> None:
    chat = assistants().chat()
    with pytest.raises(ValueError, match=r"tokens, .* and the model reads 512: shorten it"):
        list(chat.ask("red " * 600))
    with pytest.raises(ValueError, match=r"half of a character \('\\udce9'\)"):
        list(chat.ask("caf\udce9"))
    assert chat.messages == [] and list(chat.ask("What?", max_new_tokens=3))


def test_an_error_inside_generate_reaches_the_reader(
    assistants: Callable, files: list[Path]
) -> None:
    assistant = assistants()

    def fail(*_: object) -> None:
        raise RuntimeError("no memory")

    chat = assistant.chat(files[0])
    hook = assistant.model.model.language_model.register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="no memory"):
            list(chat.ask("What?"))
    finally:
        hook.remove()
    assert chat.messages == []
    said = "".join(chat.ask("What?", max_new_tokens=5)).strip()
    assert said == assistant.answer(files[0], "What?", max_new_tokens=5).text


def test_load_takes_a_checkpoint_folder(
    tiny_model: Callable, assistants: Callable, tmp_path: Path, files: list[Path]
) -> None:
    save_checkpoint(*tiny_model("phi"), tmp_path / "model")
    loaded = load(tmp_path / "model", device="cpu")
    wanted = assistants("phi").answer(files[0], QUESTIONS[0], max_new_tokens=TOKENS)
    assert loaded.answer(files[0], QUESTIONS[0], max_new_tokens=TOKENS) == wanted
    for dtype in ("bfloat16", torch.bfloat16):
        rounded = load(tmp_path / "model", device="cpu", dtype=dtype)
        assert {weight.dtype for weight in rounded.model.parameters()} == {torch.bfloat16}
        assert rounded.answer(files[0], QUESTIONS[0], max_new_tokens=TOKENS).text
    with pytest.raises(
        ValueError,
        match=r"no dtype 'int4' to answer in: use one of auto, float32, bfloat16, float16",
    ):
        load(tmp_path / "model", dtype="int4")
    with pytest.raises(ValueError, match=r"is neither a run .* nor a whole model"):
        load(tmp_path)
    create_run(tmp_path / "run", load_recipe("quickstart"))
    with pytest.raises(FileNotFoundError, match="has not finished finetune"):
        load(tmp_path / "run")


@pytest.fixture
def saved(tiny_model: Callable, tmp_path: Path) -> Path:
    save_checkpoint(*tiny_model(), tmp_path / "model")
    return tmp_path / "model"


def _edit(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("ids", [None, []])
def test_an_answer_ends_with_the_tokenizers_end_where_the_model_names_none(
    saved: Path, ids: object
) -> None:
    _edit(saved / "generation_config.json", lambda config: config.update(eos_token_id=ids))
    assistant = load(saved, "cpu")
    assert assistant.end_tokens == {assistant.processor.tokenizer.eos_token_id}


def test_a_word_that_the_model_does_not_have_is_named(saved: Path) -> None:
    def move(content: dict) -> None:
        vocabulary = content["model"]["vocab"]
        vocabulary["q"] = 70_000

    _edit(saved / "tokenizer.json", move)
    with pytest.raises(ValueError, match="the tokenizer makes token 70000, and the model has"):
        load(saved, "cpu").answer(None, "q")


def test_a_conversation_without_tokens_is_named(saved: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (saved / "chat_template.jinja").write_text(template)
    step = {"type": "Replace", "pattern": {"Regex": "."}, "content": ""}
    _edit(saved / "tokenizer.json", lambda content: content.update(normalizer=step))
    with pytest.raises(ValueError, match="make no tokens of a conversation"):
        load(saved, "cpu").answer(None, "What is it?")


def test_a_pattern_that_the_tokenizer_gives_up_on_is_a_sentence(saved: Path) -> None:
    pattern = {"Regex": "((([a-zA-Z <>|_]+)*)*)*$"}
    step = {"type": "Replace", "pattern": pattern, "content": "x"}
    _edit(saved / "tokenizer.json", lambda content: content.update(normalizer=step))
    with pytest.raises(ValueError, match="the tokenizer cannot split a text"):
        load(saved, "cpu").answer(None, "What is it?" * 9)


def test_a_template_that_loses_the_image_is_named(saved: Path, files: list[Path]) -> None:
    template = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    (saved / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match="the chat template and the tokenizer lose or add image"):
        load(saved, "cpu").answer(files[0], "What is it?")


def test_a_config_is_not_blamed_on_the_tokenizer(saved: Path) -> None:
    _edit(saved / "config.json", lambda config: config["text_config"].update(rms_norm_eps="x"))
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        load(saved, "cpu")


def test_pixels_without_a_range_are_no_empty_answer(
    assistants: Callable, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assistant = assistants()
    monkeypatch.setattr(assistant.processor.image_processor, "image_std", [0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="no finite scores"):
        assistant.answer(files[0], "What is it?")
