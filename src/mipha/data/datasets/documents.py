"""Documents of text and images in turn, as OBELICS publishes them.

    {"images": [null, "cat.jpg", null], "texts": ["A cat", null, "sleeps."]}

At each place is either a text or an image. The sample is one message of the role `document`: its
texts and `<image>` markers, a blank line between places. There is no question, no answer and no
chat template, and all text is trained. Images are bytes or files; addresses are not fetched.

Source: the card of HuggingFaceM4/OBELICS
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mipha.data.dataset import DataSet
from mipha.data.datasets._images import is_list
from mipha.data.datasets._records import LINE_SUFFIXES, Row, Rows, record_rows
from mipha.data.sample import BETWEEN_PLACES, IMAGE, Message, Sample


def load(root: Path | None, split: str, image_root: Sequence[Path] = ()) -> Rows:
    """Index the documents of a split; arguments and errors as in `messages`."""
    return record_rows("documents", root, split, LINE_SUFFIXES, image_root)


def to_sample(row: Row) -> Sample:
    """Read one document.

    Raises:
        RecordError: A place holds both a text and an image or neither, a text is not text, or no
            place has text.
    """
    if not isinstance(row.content, Mapping) or not is_document(row.content):
        raise row.fault(
            "it is no document of texts and images",
            'wanted {"images": [image or null], "texts": [text or null]} of one length',
        )
    keys = row.keys()
    keys.read.update(("images", "texts", "metadata", "general_metadata"))
    if not keys.with_marks([Message("assistant", "")])[0].learned:
        raise row.fault("its marks say that it is not to be learned", "remove the row", "loss-mark")

    # One place after another.
    texts, images = row.content["texts"], row.content["images"]
    if len(texts) != len(images):
        raise row.fault(
            f"it has {len(texts)} texts for {len(images)} images",
            "wanted as many of both, one of the two null at each place",
        )
    places: list[str] = []
    for number, (text, image) in enumerate(zip(texts, images, strict=True)):
        if (text is None) == (image is None):
            held = "nothing" if text is None else "both a text and an image"
            raise row.fault(f"place {number} holds {held}", "wanted one of the two at each place")
        if text is not None and not isinstance(text, str):
            raise row.fault(f"place {number} holds {str(text)[:80]}", "wanted text or null")
        if text is not None and IMAGE in text:
            about = f"{IMAGE} stands in the texts of documents and is left out"
            keys.remark("foreign-marker", about, f"{about}: place {number}")
            text = text.replace(IMAGE, "")
        if text is None or text.strip():
            places.append(IMAGE if text is None else text.strip())
    if all(place == IMAGE for place in places):
        raise row.fault("no place of the document has text", "remove the row", "nothing-trained")

    shown = [image for image in images if image is not None]
    return row.sample([Message("document", BETWEEN_PLACES.join(places))], shown, keys)


def is_document(content: Mapping[str, Any]) -> bool:
    """Return whether a record has lists `texts` and `images`, texts being text or None."""
    texts, images = content.get("texts"), content.get("images")
    return (
        is_list(texts)
        and is_list(images)
        and len(texts) > 0
        and all(text is None or isinstance(text, str) for text in texts)
    )


DATASET = DataSet("documents", load, to_sample, takes_image_root=True)
