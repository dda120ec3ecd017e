"""Multiple choice: how a prompt lists options, which option an answer names, and asking a judge.

Source: haotian-liu/LLaVA c121f043 `scripts/v1_5/eval` (prompts); open-compass/VLMEvalKit e8e78f05
    (August 2026) `vlmeval/utils/matching_util.py:can_infer` and
    `vlmeval/dataset/utils/multiple_choice.py` (reading). Older versions, such as the one that the
    MMBench server ran in early 2024, lack the position, length and "answer is" rules.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from mipha.evaluation.benchmark import Judge
from mipha.evaluation.judge import UnreadError, explain_unread, strip_reasoning

LETTER = "\nAnswer with the option's letter from the given choices directly."
"""End of a LLaVA-1.5 prompt that asks for a letter."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

REFUSED = "Z"
"""Letter of an answer that refuses, or that a judge finds unlike every option."""

JUDGE_TRIES = 3
JUDGE_MAX_TOKENS = 1024

_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_NO_REPLY = "Failed to obtain answer via API"
_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
# No word boundary follows the letter: "the answer is blue" names B.
_ANSWER_IS = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])", re.IGNORECASE)
_LAST_WORDS = 4

_PROMPT = (
    "You are an AI assistant who will help me to match an answer with several options of a "
    "single-choice question. "
    "You are provided with a question, several options, and an answer, "
    "and you need to find which option is most similar to the answer. "
    "If the meaning of all options are significantly different from the answer, output Z. "
    "Your should output a single uppercase character in A, B, C, D (if they are valid options), "
    "and Z. \n"
    "Example 1: \n"
    "Question: What is the main object in image?\nOptions: A. teddy bear B. rabbit C. cat D. dog\n"
    "Answer: a cute teddy bear\nYour output: A\n"
    "Example 2: \n"
    "Question: What is the main object in image?\nOptions: A. teddy bear B. rabbit C. cat D. dog\n"
    "Answer: Spider\nYour output: Z\n"
    "Example 3: \n"
    "Question: {question}?\nOptions: {options}\nAnswer: {answer}\nYour output: "
)
# The first example's heading has neither space nor line break, in the original as here.
_PROMPT_CN = (
    "你是一个帮助我匹配答案与单选题中多个选项的 AI 助手。"
    "你会被提供：一个问题，多个选项，一个答案。你的任务是找到与答案意义最相近的选项。"
    "如果所有选项的意义都与答案显著不同，则输出 Z。"
    "你应该输出一个单个的大写字母，例如 A, B, C, D（如果它们是有效选项），或 Z。"
    "例 1:"
    "问题: 图中最主要的物体是什么?\n选项: A. 泰迪熊 B. 兔子 C. 猫 D. 狗\n"
    "答案: 一只可爱的泰迪熊\n输出: A\n"
    "例 2: \n"
    "问题: 图中最主要的物体是什么?\n选项: A. 泰迪熊 B. 兔子 C. 猫 D. 狗\n答案: 蜘蛛\n输出: Z\n"
    "例 3: \n"
    "问题: {question}?\n选项: {options}\n答案: {answer}\n输出: "
)


_STRIPPED = ",.!?;:'\""
_PHRASES = (
    *("the answer is", "answer is", "the correct answer is", "correct answer is"),
    *("the best answer is", "best answer is", "the correct option is", "correct option is"),
    *("the best option is", "best option is", "the choice is", "choice is"),
    *("the correct choice is", "correct choice is", "i choose", "i select", "i pick"),
    *("my answer is", "my choice is"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)
_KINDS = {"start": 10, "end": 9, "phrase": 7, "({})": 6, "{}.": 5, "{}:": 4, "{})": 3, "{} ": 2}
"""Rank of the ways in which a letter can be named; a pattern stands anywhere in the text."""


def list_options(choices: Sequence[str]) -> str:
    """Return one line per option, each after a newline: `\\nA. red\\nB. blue`."""
    return "".join(
        f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)
    )


def read_option(answer: str, choices: Mapping[str, str]) -> str | None:
    """Return the letter that an answer names.

    Args:
        answer: The text, verbatim.
        choices: Letter to option text.

    Returns:
        A letter, `Z` for a refusal, or None where the rules cannot tell.
    """
    return _read_letter(answer, choices) or _read_text(answer, choices)


def read_ranked_letter(answer: str, letters: str = "ABCD") -> str | None:
    """Return the capital letter that an answer names most clearly, as lmms-eval reads it.

    A letter at the start of the text comes before one at its end, then one behind a phrase such as
    "the answer is", then `(A)`, `A.`, `A:`, `A)`, `A`, and at last one anywhere. Among equals the
    later one counts. So "A car turns, so the answer is C" names A.

    Args:
        answer: The text, verbatim.
        letters: Letters that count.

    Source: EvolvingLMMs-Lab/lmms-eval 75571cfe `tasks/_task_utils/mcq_extract.py`.
    """
    text = answer.strip()
    if not text:
        return None
    for mark in _STRIPPED:
        text = text.strip(mark)
    text = f" {text} "
    bare = text.strip()

    # Every place of a letter: (rank, position, letter), in the order in which they are looked for.
    found = []
    for pattern in ("({})", "{}.", "{}:", "{})", "{} "):
        for letter in letters:
            if (position := text.rfind(pattern.format(letter))) >= 0:
                found.append((_KINDS[pattern], position, letter))
    for phrase in _PHRASES:
        if (start := text.lower().find(phrase)) >= 0:
            for letter in letters:
                if (position := text.find(letter, start + len(phrase))) >= 0:
                    found.append((_KINDS["phrase"], position, letter))
    for letter in letters:
        if bare.startswith(letter) and not bare[1:2].isalpha():
            found.append((_KINDS["start"], 0, letter))
        if bare.endswith(letter) and not bare[-2:-1].isalpha():
            found.append((_KINDS["end"], len(text) - 1, letter))
    if not found:
        places = ((0, text.rfind(letter), letter) for letter in letters)
        found = [place for place in places if place[1] >= 0]

    # `max` keeps the first of equal ones.
    best = max(found, key=lambda place: place[:2], default=None)
    return best[2] if best else None


def matching_prompt(question: str, choices: Mapping[str, str], answer: str) -> str:
    """Return the question to a judge, in Chinese if the question has a Chinese character."""
    options = "There are several options: \n" + "".join(
        f"{letter}. {option}\n" for letter, option in choices.items()
    )
    template = _PROMPT_CN if is_chinese(question) else _PROMPT
    return template.format(question=question, options=options, answer=answer)


def ask_for_option(
    question_id: str, question: str, choices: Mapping[str, str], answer: str, judge: Judge
) -> str:
    """Ask a judge which option an answer names; the part in which it thinks is not read.

    Returns:
        A letter.

    Raises:
        UnreadError: No reply names one. The official program then draws an option at random; a
            score must not depend on that.
    """
    prompt = matching_prompt(question, choices, answer)
    replies = []
    for attempt in range(JUDGE_TRIES):
        reply = judge.ask(question_id, prompt, attempt=attempt, max_tokens=JUDGE_MAX_TOKENS)
        if letter := read_option(strip_reasoning(reply), choices):
            return letter
        replies.append(reply)

    judge.forget(question_id)
    raise UnreadError(explain_unread("option", replies))


def is_chinese(text: str) -> bool:
    """Return whether the text has a Chinese character."""
    return re.search("[\u4e00-\u9fff]", text) is not None


def _read_letter(answer: str, choices: Mapping[str, str]) -> str | None:
    if _NO_REPLY in answer:
        return None
    if any(refusal in answer for refusal in _REFUSALS):
        return REFUSED

    # The first occurrence must be among the last words: "A dog chases the red ball" is about a dog.
    words = answer.translate(_MARKS).split()
    named = [letter for letter in choices if letter in words]
    if len(named) == 1 and words.index(named[0]) >= len(words) - _LAST_WORDS:
        return named[0]
    if not named and REFUSED in words:
        return REFUSED

    found = _ANSWER_IS.search(answer)
    return found[1].upper() if found and found[1].upper() in choices else None


def _read_text(answer: str, choices: Mapping[str, str]) -> str | None:
    answer = answer.lower()
    if len(answer) > 2 * sum(map(len, choices.values())):
        return None
    contained = [letter for letter, option in choices.items() if option.lower() in answer]
    return contained[0] if len(contained) == 1 else None
