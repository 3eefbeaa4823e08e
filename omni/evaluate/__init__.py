"""Evaluation: every direction between modalities on held-out data, and the report."""

from omni.evaluate.data import EvaluationData, Examples, WordRequest
from omni.evaluate.report import write_report
from omni.evaluate.run import evaluate, read_samples
from omni.evaluate.settings import EvaluationSettings

__all__ = [
    "EvaluationData",
    "EvaluationSettings",
    "Examples",
    "WordRequest",
    "evaluate",
    "read_samples",
    "write_report",
]
