"""The kinds of findings: how bad each is, how to fix it, and what a cleaned copy does about it."""

from __future__ import annotations

from typing import Literal, NamedTuple

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


class Kind(NamedTuple):
    """One kind of finding.

    Args:
        severity: `error` stops a training run or teaches what is certainly wrong; `warning`
            trains, but is seldom meant; `note` is handled by a stated rule, and good to know.
        title: Heading.
        fix: Advice to the user; ends every sentence about it.
        action: What a cleaned copy does: leave the row out, repair its text, or keep it.
    """

    severity: Severity
    title: str
    fix: str
    action: Literal["drop", "repair", "keep"] = "keep"


KINDS: dict[str, Kind] = {
    # the record
    "malformed": Kind(
        "error",
        "rows that are no conversation",
        "write the row as its format says, or remove it",
        "drop",
    ),
    "role-order": Kind(
        "error",
        "turns in the wrong order",
        "let user and assistant take turns, and end with an answer",
        "drop",
    ),
    "left-out-turn": Kind(
        "warning",
        "turns that the format leaves out",
        "begin with the user's turn and end with an answer",
    ),
    "unread-content": Kind(
        "error",
        "keys that nothing reads, which change the meaning of the row",
        "give the key a name that is read, or remove it",
        "drop",
    ),
    "unread-key": Kind(
        "warning",
        "keys that nothing reads",
        "nothing if they say where the row comes from; else give them a name that is read",
    ),
    "loss-mark": Kind(
        "error",
        "marks on what is learned that cannot be followed",
        'write "weight": 1 or 0 in each turn, or remove the row',
        "drop",
    ),
    "unclear-choice": Kind(
        "error",
        "options and answers that do not go together",
        "give the option's letter, its words, or its number from 0",
        "drop",
    ),
    "added-marker": Kind(
        "note",
        "images without a marker",
        "nothing if the image belongs in front of the first turn",
        "repair",
    ),
    "rating-count": Kind(
        "warning",
        "ratings that are not one for each turn",
        "write a rating for each turn, or null",
    ),
    "left-out": Kind("warning", "what the format leaves out", "add what is missing, or remove it"),
    "merged-marker": Kind(
        "warning",
        "image markers that LLaVA's rule makes one of",
        "write one <image> for each image",
    ),
    "image-count": Kind(
        "error", "image markers and images do not match", "write one <image> for each image", "drop"
    ),
    "image-in-answer": Kind(
        "error", "an image marker in an answer", "move <image> to the user's turn", "drop"
    ),
    "outside-path": Kind(
        "error",
        "paths that lead out of the data's folder",
        "give a path inside the data's folder",
        "drop",
    ),
    # its regions
    "region-count": Kind(
        "error", "regions and their places do not match", "give each region one place", "drop"
    ),
    "region-scale": Kind(
        "error",
        "numbers of regions that may be of another scale",
        "say bbox_format, bbox_scale or point_scale, or fix the row",
        "drop",
    ),
    "region-outside": Kind(
        "error", "regions that reach out of their image", "fix the numbers, or their scale", "drop"
    ),
    "region-empty": Kind("error", "boxes without an area", "fix the numbers", "drop"),
    # its images
    "null-image": Kind(
        "error",
        "null among the images of a row",
        "remove the null, or put the image there",
        "drop",
    ),
    "missing-image": Kind(
        "error",
        "missing image files",
        "put the file there, fix the path, or remove the row",
        "drop",
    ),
    "unreadable-image": Kind(
        "error", "files that are no images", "get the file again, or remove the row", "drop"
    ),
    "truncated-image": Kind(
        "error", "images cut short or damaged", "get the file again, or remove the row", "drop"
    ),
    "oversized-image": Kind("error", "images of too many pixels", "make the image smaller", "drop"),
    "tiny-image": Kind(
        "warning", "tiny images", "use the image in its original size, or remove the row"
    ),
    "extreme-aspect": Kind(
        "warning", "extremely long or wide images", "crop the image, or cut it into several"
    ),
    "blank-image": Kind(
        "warning",
        "images of one flat colour",
        "look at the image, and remove the row if nothing is on it",
    ),
    "exif-rotation": Kind(
        "note",
        "images stored turned (EXIF)",
        "nothing, it is turned upright here; other programs may not do so",
    ),
    "animated-image": Kind(
        "note", "animated images", "nothing if the first frame is meant; only that one is seen"
    ),
    "converted-image": Kind(
        "note", "images in unusual colours", "nothing if it looks right after conversion to RGB"
    ),
    "wrong-suffix": Kind(
        "note",
        "images named as another format",
        "nothing, the content decides here; rename it for other programs",
    ),
    "repeated-image": Kind(
        "note",
        "one image under several names",
        "name one file in all rows, so that splits by image hold",
    ),
    # its words
    "empty-answer": Kind("error", "empty answers", "write the answer, or remove the row", "drop"),
    "no-preference": Kind(
        "error", "pairs of the same answer twice", "remove the row, or set skip_empty=true", "drop"
    ),
    "empty-question": Kind("warning", "empty questions", "write the question, or remove the row"),
    "long-answer": Kind(
        "warning", "very long answers", "look whether another text slipped in, and cut it"
    ),
    "placeholder-answer": Kind(
        "warning", "answers that stand for a missing value", "write the answer, or remove the row"
    ),
    "echo": Kind(
        "warning", "answers that repeat the question", "write the answer, or remove the row"
    ),
    "repetition": Kind(
        "warning", "answers that go in circles", "cut the repeated part, or remove the row"
    ),
    "refusal": Kind(
        "note",
        "answers of another assistant that refuses",
        "remove the row, unless refusing is to be learned",
    ),
    "turn-in-text": Kind(
        "warning", "turns of a conversation inside one text", "split the text into messages"
    ),
    "special-token": Kind(
        "error", "control tokens written in a text", "remove the token from the text", "drop"
    ),
    "foreign-marker": Kind(
        "error",
        "markers and placeholders of other programs",
        "write <image> for an image, the words for another placeholder, or remove it",
        "drop",
    ),
    "lone-surrogate": Kind(
        "error",
        "half characters (lone surrogates)",
        "remove it, or write the whole character",
        "repair",
    ),
    "replacement-character": Kind(
        "warning",
        "characters lost in an earlier conversion (U+FFFD)",
        "read the source again in its own encoding",
    ),
    "mojibake": Kind(
        "warning", "text read in the wrong encoding", "read the source as UTF-8", "repair"
    ),
    "control-characters": Kind("warning", "control characters", "remove them", "repair"),
    "invisible-characters": Kind("warning", "invisible characters", "remove them", "repair"),
    "markup": Kind(
        "note", "HTML in a text", "turn it into plain text, unless HTML is to be learned"
    ),
    # its tokens
    "nothing-trained": Kind(
        "error",
        "samples with no trained token",
        "fix or remove the sample, or raise row_tokens",
        "drop",
    ),
    "too-many-images": Kind(
        "error",
        "samples whose images alone fill a row",
        "raise row_tokens, or use fewer images",
        "drop",
    ),
    "truncated-answer": Kind(
        "warning", "answers cut off by row_tokens", "raise row_tokens, or shorten the conversation"
    ),
    "long-pair": Kind(
        "error",
        "pairs longer than max_tokens, which are never cut",
        "raise max_tokens, or remove the row",
        "drop",
    ),
    # the whole set
    "duplicate": Kind("warning", "rows that repeat an earlier one", "remove one of them", "drop"),
    "conflicting-answer": Kind("warning", "one question, two answers", "keep the right one"),
    "leak": Kind(
        "error",
        "questions of the evaluation set in the training set",
        "remove the row from the training set",
        "drop",
    ),
    "leaked-image": Kind(
        "warning",
        "images of the evaluation set in the training set",
        "remove the row, unless new questions are all that counts",
    ),
    "near-image": Kind(
        "warning",
        "images that look like one of the evaluation set",
        "look at both, and remove the row if they are one image",
    ),
    "unbalanced-answers": Kind(
        "warning",
        "one answer for nearly everything",
        "add rows with other answers, or report a baseline beside every score",
    ),
    "uncompared": Kind(
        "warning",
        "evaluation rows that could not be compared",
        "check the evaluation set by itself",
    ),
}


Problem = tuple[str, str]
"""Kind, and what was seen: a finding before its row is known."""


class Finding(NamedTuple):
    """One thing found.

    Args:
        kind: Key of `KINDS`; those of `faults.FaultKind` are raised by readers.
        row: Place in the data set, from 0, as `show --row` takes it; None for the whole set.
        where: The row as its file counts, such as `train.jsonl line 18`.
        what: What was seen, without advice.
        own_fix: Advice on this one; empty where that on its kind fits.
    """

    kind: str
    row: int | None
    where: str
    what: str
    own_fix: str = ""

    @property
    def severity(self) -> Severity:
        """How bad the finding is."""
        return KINDS[self.kind].severity

    @property
    def fix(self) -> str:
        """What to do."""
        return self.own_fix or KINDS[self.kind].fix

    @property
    def sentence(self) -> str:
        """What was seen, and what to do."""
        return f"{self.what}: {self.fix}"


def quoted(text: str, most: int = 60) -> str:
    """Return a text for a message: on one line, unprintable characters escaped, cut to a length."""
    shown = repr(text if len(text) <= most else text[: most - 1] + "…")
    return shown.encode("utf-8", "backslashreplace").decode()
