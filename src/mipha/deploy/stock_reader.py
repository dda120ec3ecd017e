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
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor


@torch.inference_mode()
def main(folder: Path) -> None:
    """Answer the questions of a request, and describe the model that was loaded.

    Args:
        folder: Folder of the request. `request.json` holds `checkpoint`, `device`,
            `max_new_tokens`, `logits_to_keep` and `asked`: pairs of an image's file name in the
            folder (None for no image) and a question.
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
    processor = AutoProcessor.from_pretrained(request["checkpoint"], local_files_only=True)

    # Answer.
    ids, answers, features, tensors = [], [], [], {}
    for number, (image, question) in enumerate(request["asked"]):
        content = [{"type": "image", "path": str(folder / image)}] if image else []
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
        inputs = processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        inputs = inputs.to(model.device)
        if image:
            tensors[f"pixels.{number}"] = inputs["pixel_values"][0]
            features.append(len(model.get_image_features(inputs["pixel_values"]).pooler_output[0]))
        tensors[f"logits.{number}"] = model(
            **inputs, logits_to_keep=request["logits_to_keep"]
        ).logits[0]
        out = model.generate(**inputs, max_new_tokens=request["max_new_tokens"], do_sample=False)[0]
        ids.append(inputs["input_ids"][0].tolist())
        answers.append(processor.decode(out[len(ids[-1]) :], skip_special_tokens=True).strip())

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
        "image_token_ids": [processor.image_token_id, model.config.image_token_id],
        "pad_id": processor.tokenizer.pad_token_id,
        "vocabulary": [len(processor.tokenizer), len(embeddings)],
    }
    save_file(
        {name: tensor.float().cpu().contiguous() for name, tensor in tensors.items()},
        folder / "reply.safetensors",
    )
    (folder / "reply.json").write_text(json.dumps(reply), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
