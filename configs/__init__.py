"""One file for each published run; all start from `default`."""
