"""The report page of a run, a sweep or a check of recorded curves: one HTML file that opens offline."""

PAGE = "report.html"
