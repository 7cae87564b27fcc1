"""Room pipeline: the stages in order, each a room's work under one recipe, one budget and one run directory.

A stage is one file in `pipeline/stages/` with `needs(recipe)` (stages it reads), `uses(recipe)` (what decides its
result), `plan(planner) -> Cost` and `run(context) -> dict of figures`. Each runs in a process of its own,
so that its peak memory is its own and a kill loses nothing that was finished.
"""

STAGES = ("curate", "predict", "pretrain", "ground", "adapt", "compress", "serve", "evaluate")
