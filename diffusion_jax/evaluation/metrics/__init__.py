"""Metrics: features -> numbers."""
