"""A run as a page: facts, plots, pictures, report.html."""
