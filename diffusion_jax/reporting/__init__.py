"""The report of a run: facts, plots, pictures, report.html."""
