"""Measuring what a policy has learned."""

from loopfast.evaluation.commands import evaluate_checkpoint, sample_images
from loopfast.evaluation.evaluate import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate", "evaluate_checkpoint", "sample_images"]
