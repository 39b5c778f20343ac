"""Exports a trained model in diffusers' form, with a model card."""

from loopfast.exporting.export import export_run
from loopfast.exporting.pipeline import trained_pipeline

__all__ = ["export_run", "trained_pipeline"]
