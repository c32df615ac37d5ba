"""Reproducing a paper: what is published, what it costs, how ours compares."""
