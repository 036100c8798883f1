"""The report of a run: one self-contained ``report.html`` for people and ``report.json`` for programs."""

from polyalign.evaluation.report.page import write_report

__all__ = ["write_report"]
