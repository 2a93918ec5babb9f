"""The report of one or several runs: one HTML file that needs nothing else, or a page that follows a live run.

read_run     what a run folder says, ready for the page
write_report the file
serve        the page of a run that is still going on
"""

from rwkv_accel.report.page import write_report

__all__ = ["write_report"]
