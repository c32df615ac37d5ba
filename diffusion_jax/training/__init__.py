"""State, step, loop, and what keeps them: sharding, checkpoints, metrics."""
