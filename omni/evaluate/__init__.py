"""Evaluation: every direction between modalities on held-out data or a user's documents, and the reports."""

from omni.evaluate.data import EvaluationData, Examples, WordRequest
from omni.evaluate.own import evaluate_documents
from omni.evaluate.report import write_documents_report, write_report
from omni.evaluate.run import evaluate, read_samples
from omni.evaluate.settings import DocumentSettings, EvaluationSettings

__all__ = [
    "DocumentSettings",
    "EvaluationData",
    "EvaluationSettings",
    "Examples",
    "WordRequest",
    "evaluate",
    "evaluate_documents",
    "read_samples",
    "write_documents_report",
    "write_report",
]
