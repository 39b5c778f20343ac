"""Reports of a run: the HTML page, pictures and labeled image grids, curves, plots of a schedule."""

from loopfast.reporting.curves import Curve, reward_curves
from loopfast.reporting.images import image_grid
from loopfast.reporting.picture import run_picture
from loopfast.reporting.report import write_report
from loopfast.reporting.schedule import schedule_plot

__all__ = ["Curve", "image_grid", "reward_curves", "run_picture", "schedule_plot", "write_report"]
