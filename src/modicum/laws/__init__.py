"""Room laws: what a larger run will reach, from the records of smaller ones, and how to spend a budget."""
