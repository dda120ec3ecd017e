"""Answers of an exported model in OpenVINO, by an interpreter that has OpenVINO and not mipha.

    python benchmarks/openvino_worker.py genai|optimum FOLDER < questions.jsonl > answers.jsonl

`openvino_parity.py` starts it. Each line in is `{"image": path, "text": ..., "max_tokens": ...}`;
each line out is an answer as a JSON string.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from PIL import Image


def genai(folder: str) -> Callable[[dict[str, Any]], str]:
    """Load OpenVINO GenAI, which prepares images itself."""
    import numpy as np
    import openvino
    import openvino_genai

    pipeline = openvino_genai.VLMPipeline(folder, "CPU")

    def answer(asked: dict[str, Any]) -> str:
        greedy = openvino_genai.GenerationConfig(
            max_new_tokens=asked["max_tokens"], do_sample=False
        )
        image = openvino.Tensor(np.array(Image.open(asked["image"]).convert("RGB"))[None])
        return str(pipeline.generate(asked["text"], images=[image], generation_config=greedy))

    return answer


def optimum(folder: str) -> Callable[[dict[str, Any]], str]:
    """Load optimum-intel, with the checkpoint's own processor, in float32."""
    from optimum.intel import OVModelForVisualCausalLM
    from transformers import AutoProcessor

    model = OVModelForVisualCausalLM.from_pretrained(
        folder, export=False, ov_config={"INFERENCE_PRECISION_HINT": "f32"}
    )
    processor = AutoProcessor.from_pretrained(folder)

    def answer(asked: dict[str, Any]) -> str:
        content = [{"type": "image"}, {"type": "text", "text": asked["text"]}]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = processor(
            images=Image.open(asked["image"]).convert("RGB"), text=prompt, return_tensors="pt"
        )
        ids = model.generate(**inputs, max_new_tokens=asked["max_tokens"], do_sample=False)
        return processor.decode(ids[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return answer


if __name__ == "__main__":
    ask = {"genai": genai, "optimum": optimum}[sys.argv[1]](sys.argv[2])
    for line in sys.stdin:
        print(json.dumps(ask(json.loads(line)).strip()), flush=True)
