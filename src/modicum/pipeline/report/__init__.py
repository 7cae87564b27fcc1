"""The report of a run: one HTML file that needs no network, and the same in short for the terminal."""

from modicum.pipeline.report.page import write_report
from modicum.pipeline.report.text import as_json, as_text

__all__ = ["as_json", "as_text", "write_report"]
