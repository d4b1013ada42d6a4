"""Facts of the picture tasks: whose experts answer them, the public benchmarks nearest to them, and test questions.

InternVL's and Qwen2-VL's experts share them.
"""

from __future__ import annotations

from pathlib import Path

from expert_merging.questions.calibration import Sample

EXPERTS = ("OCR", "VQA", "Geometry", "Chart", "Grounding")

# The usual calibration tasks that are not called like their expert.
TASK_EXPERTS = {
    "VizWiz": "VQA",
    "GQA": "VQA",
    "MathVista": "Geometry",
    "MathVision": "Geometry",
    "OCRVQA": "OCR",
    "TextVQA": "OCR",
}

_IMAGES = Path(__file__).resolve().parent / "images"
TEST_QUESTIONS = (
    Sample.test("What is shown in this picture?", _IMAGES / "grounding-0.png"),
    Sample.test("What does the sign say?", _IMAGES / "ocr-0.png"),
    Sample.test("A train covers 180 km in 2.5 hours. What is its mean speed in km/h?"),
)

# VLMEvalKit's names of the public benchmarks nearest to the calibration tasks, and its classes for them.
BENCHMARKS = {
    "VizWiz": "VizWiz",
    "GQA_TestDev_Balanced": "ImageVQADataset",
    "MathVista_MINI": "MathVista",
    "MathVision_MINI": "MathVision",
    "ChartQA_TEST": "ImageVQADataset",
    "TextVQA_VAL": "ImageVQADataset",
    "OCRVQA_TESTCORE": "ImageVQADataset",
}
