"""Reports of benchmark results: `sleb bench report`, and what `--report DIR` of the benchmarks writes."""

from sleb.benchmarks.reports.write import check_report, write_report

__all__ = ["check_report", "write_report"]
