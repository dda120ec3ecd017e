"""InfographicVQA: questions about infographics, scored as those of DocVQA, and by kind of question.

See `docvqa` for the code that both share. The labels of a question are in the official file with
question types; the .parquet files lack `evidence`.
"""

from mipha.evaluation.benchmarks.docvqa import Edition, make_benchmark

INFOVQA = Edition(
    name="infovqa",
    title="InfographicVQA",
    task="task 3",
    files={
        "validation": ("infographicsVQA_val_v1.0_withQT.json", "infographicsVQA_val_v1.0.json"),
        "test": ("infographicsVQA_test_v1.0.json",),
    },
    table="InfoVQA_VAL.tsv",
    config="InfographicVQA",
    image_key="image_local_name",
    image_folders=("images", "infographicsvqa_images"),
    sizes={"validation": 2801, "test": 3288},
    groups={
        "answer_type": (
            "answer_type",
            {
                "image span": "Image-Span",
                "question span": "Question-Span",
                "multiple spans": "Multi-Span",
                "non span": "None span",
            },
        ),
        "evidence": (
            "evidence",
            {
                "table/list": "Table/list",
                "textual": "Text",
                "photo/pciture/visual_objects": "Visual/Layout",  # spelt so in the files
                "figure": "Figure",
                "map": "Map",
            },
        ),
        "operation/reasoning": (
            "operation",
            {"comparison": "Sorting", "arithmetic": "Arithmetic", "counting": "Counting"},
        ),
    },
)

BENCHMARK = make_benchmark(INFOVQA)
