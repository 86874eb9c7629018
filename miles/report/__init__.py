"""The report of a run: one self-contained HTML page, and the small record that `status` prints. Imports neither torch nor transformers."""

from miles.report.build import build_report
from miles.report.summary import Summary, merge_service, summarise

__all__ = ["Summary", "build_report", "merge_service", "summarise"]
