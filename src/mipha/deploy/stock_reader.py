"""Load a checkpoint with transformers alone, in a process where an import of mipha fails.

python -P stock_reader.py FOLDER    reads FOLDER/request.json and the images,
                                    writes FOLDER/reply.json and FOLDER/reply.safetensors
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.modules["mipha"] = None  # type: ignore[assignment]

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer


@torch.inference_mode()
def main(folder: Path) -> None:
    """Answer the questions of a request, and describe the model that was loaded.

    Args:
        folder: Folder of the request. `request.json` holds `checkpoint`, `device`,
            `max_new_tokens`, `logits_to_keep` and `asked`: the content parts of each question, an
            image with its path. `inputs.safetensors` holds the model's
            inputs for each, as `0.input_ids`, for classes whose processor needs torchvision.
    """
    # Load the model and the processor.
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    model, info = AutoModelForImageTextToText.from_pretrained(
        request["checkpoint"],
        dtype=torch.float32,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    model = model.to(request["device"]).eval()
    try:
        processor = AutoProcessor.from_pretrained(request["checkpoint"], local_files_only=True)
    except (ImportError, ValueError) as error:
        # Where torchvision is missing, the model gets the inputs that were made for it.
        if "torchvision" not in str(error).lower():
            raise
        processor = None
    tokenizer = AutoTokenizer.from_pretrained(request["checkpoint"], local_files_only=True)
    made = load_file(folder / "inputs.safetensors")

    # Answer.
    ids, answers, features, tensors = [], [], [], {}
    for number, content in enumerate(request["asked"]):
        if processor is None:
            prefix = f"{number}."
            inputs = {
                name.removeprefix(prefix): value.to(model.device)
                for name, value in made.items()
                if name.startswith(prefix)
            }
        else:
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
            inputs = inputs.to(model.device)
        if any(part["type"] == "image" for part in content):
            tensors[f"pixels.{number}"] = inputs["pixel_values"]
            pixels = {
                name: value
                for name, value in inputs.items()
                if name not in ("input_ids", "attention_mask", "mm_token_type_ids")
            }
            made_features = model.get_image_features(**pixels, return_dict=True).pooler_output
            features.append(sum(map(len, made_features)))
        tensors[f"logits.{number}"] = model(
            **inputs, logits_to_keep=request["logits_to_keep"]
        ).logits[0]
        out = model.generate(**inputs, max_new_tokens=request["max_new_tokens"], do_sample=False)[0]
        ids.append(inputs["input_ids"][0].tolist())
        answers.append(tokenizer.decode(out[len(ids[-1]) :], skip_special_tokens=True).strip())

    # Describe the model.
    eos, embeddings = model.generation_config.eos_token_id, model.get_input_embeddings().weight
    reply = {
        "without_mipha": "mipha" in sys.modules and sys.modules["mipha"] is None,
        "class": f"{type(model).__module__}.{type(model).__name__}",
        "ids": ids,
        "answers": answers,
        "features": features,
        "keys": {
            kind: sorted(map(str, info.get(kind, ())))
            for kind in ("missing_keys", "mismatched_keys", "unexpected_keys")
        },
        "tied": model.lm_head.weight.data_ptr() == embeddings.data_ptr(),
        "end_ids": eos if isinstance(eos, list) else [eos],
        "has_processor": processor is not None,
        "image_token_ids": [
            getattr(processor, "image_token_id", model.config.image_token_id),
            model.config.image_token_id,
        ],
        "pad_id": tokenizer.pad_token_id,
        "vocabulary": [len(tokenizer), len(embeddings)],
    }
    save_file(
        {name: tensor.float().cpu().contiguous() for name, tensor in tensors.items()},
        folder / "reply.safetensors",
    )
    (folder / "reply.json").write_text(json.dumps(reply), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
