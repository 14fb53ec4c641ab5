"""`lehr report`: a run as one HTML page."""

from lehr.report.page import render_report, write_report

__all__ = ["render_report", "write_report"]
