"""Evaluation of samples: judging networks, statistics, metric cards."""
