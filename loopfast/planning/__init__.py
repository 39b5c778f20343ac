"""Plans a run from its configuration and its model's: memory, seconds, and how both scale."""

from loopfast.planning.architectures import Architecture, known, load_architecture
from loopfast.planning.plan import Plan, plan
from loopfast.planning.report import as_dict, as_tables

__all__ = ["Architecture", "Plan", "as_dict", "as_tables", "known", "load_architecture", "plan"]
