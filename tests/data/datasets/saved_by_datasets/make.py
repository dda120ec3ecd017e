"""How the files of this folder were made, once, with datasets 5.2.0 (which the tests do not need):
`python make.py` in this folder.
"""

from __future__ import annotations

from datasets import Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

red, blue = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
red.save("red.png")

questions = Dataset.from_dict(
    {
        "image": [red, None, blue],
        "question": ["Which colour?", "Hello?", "And this?"],
        "answer": ["red", "Hi.", "blue"],
    },
    features=Features(
        {"image": ImageFeature(), "question": Value("string"), "answer": Value("string")}
    ),
)
DatasetDict({"train": questions, "test": questions.select([2])}).save_to_disk("splits")
questions.to_parquet("questions.parquet", batch_size=2)

part = {"type": Value("string"), "text": Value("string")}
messages = Dataset.from_dict(
    {
        "images": [[red, blue], [], [blue]],
        "messages": [
            [
                {
                    "role": "user",
                    "content": [{"type": "image", "text": None}] * 2
                    + [{"type": "text", "text": "Compare."}],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "Red, blue."}]},
            ],
            [
                {"role": "user", "content": [{"type": "text", "text": "Hello?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "Hi."}]},
            ],
            [
                {"role": "user", "content": [{"type": "text", "text": "Which colour?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "blue"}]},
            ],
        ],
    },
    features=Features(
        {
            "images": List(ImageFeature()),
            "messages": List({"role": Value("string"), "content": List(part)}),
        }
    ),
)
messages.save_to_disk("messages")
messages.to_parquet("messages.parquet")

# Given paths, the library writes paths: https://huggingface.co/docs/datasets/image_load
Dataset.from_dict({"image": ["red.png"], "text": ["red"]}).cast_column(
    "image", ImageFeature()
).to_parquet("paths.parquet")
