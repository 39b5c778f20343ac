"""Gets what a run has trained out: in diffusers' form, with a model card."""

from loopfast.exporting.export import export_run

__all__ = ["export_run"]
