"""What is left of a run to look at: the HTML report, labeled image grids, plots of a schedule."""

from loopfast.reporting.images import image_grid
from loopfast.reporting.report import write_report
from loopfast.reporting.schedule import schedule_plot

__all__ = ["image_grid", "schedule_plot", "write_report"]
