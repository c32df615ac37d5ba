"""Objectives: what training minimises, one value for each example."""
