"""Room train: one loop, exact checkpoints, and the ports optimizer, schedule and objective."""
