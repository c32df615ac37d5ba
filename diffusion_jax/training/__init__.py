"""Training: state, step and loop, with sharding, checkpoints and metrics."""
