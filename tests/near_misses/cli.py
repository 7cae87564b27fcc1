"""Near misses of room cli."""

from near_misses import Mutation

MUTATIONS = (
    Mutation(
        "damaged files are no reason for an exit code",
        "cli/curate.py",
        "    if any(failures.values()):\n        raise typer.Exit(1)",
        "    if any(failures.values()):\n        raise typer.Exit(0)",
        "data/test_faults.py::test_damage_is_named_and_the_rest_is_done",
    ),
)
