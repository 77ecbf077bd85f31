"""Tables, plots and the HTML report of a comparison.

``summarise`` computes, ``print_table`` shows it on a terminal, ``write_all`` writes every file. Plotting
libraries are imported only when something is drawn.
"""

from lossmith.reporting.comparison import Claim, Comparison, Cost, Curve, Forecast, ForecastPoint, Run
from lossmith.reporting.html import write_html
from lossmith.reporting.plots import write_plots
from lossmith.reporting.report import write_all
from lossmith.reporting.serialization import comparison_from_json, comparison_to_json, read_comparison
from lossmith.reporting.statistics import (
    Interval,
    Judgement,
    judge,
    paired_interval,
    paired_p_value,
    power,
    seeds_needed,
    smallest_detectable,
    standing,
    verdict,
)
from lossmith.reporting.table import ComparisonTable, summarise
from lossmith.reporting.terminal import print_table

__all__ = [
    "Claim",
    "Comparison",
    "ComparisonTable",
    "Cost",
    "Curve",
    "Forecast",
    "ForecastPoint",
    "Interval",
    "Judgement",
    "Run",
    "comparison_from_json",
    "comparison_to_json",
    "judge",
    "paired_interval",
    "paired_p_value",
    "power",
    "print_table",
    "read_comparison",
    "seeds_needed",
    "smallest_detectable",
    "standing",
    "summarise",
    "verdict",
    "write_all",
    "write_html",
    "write_plots",
]
