"""One complete, commented file for each published run."""
