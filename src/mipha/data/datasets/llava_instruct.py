"""LLaVA-1.5's second stage: 665,298 conversations, some without an image.

The root is `llava_v1_5_mix665k.json`, or its folder with `coco`, `gqa`, ... beside it.

Source: https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K
"""

from mipha.data.datasets.llava import published

DATASET = published("llava_instruct", "llava_v1_5_mix665k.json")
