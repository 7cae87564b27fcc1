"""Room train: one loop, exact checkpoints, forms, and ports for all that decides what a run costs and learns."""
