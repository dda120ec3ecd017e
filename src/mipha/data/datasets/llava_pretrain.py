"""LLaVA's first stage: 558,128 captions of LAION, CC and SBU images.

The root is `blip_laion_cc_sbu_558k.json`, or its folder, with the images beside it or in `images`.

Source: https://huggingface.co/datasets/liuhaotian/LLaVA-Pretrain
"""

from mipha.data.datasets.llava import published

DATASET = published("llava_pretrain", "blip_laion_cc_sbu_558k.json")
