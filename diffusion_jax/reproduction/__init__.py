"""Reproducing a paper: published numbers, cost, stages, comparison."""
