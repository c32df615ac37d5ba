"""Weights that others trained: their formats, read without their code."""
