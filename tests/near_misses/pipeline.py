"""Near misses of room pipeline."""

from near_misses import Mutation

MUTATIONS = (
    # pipeline: squeeze
    Mutation(
        "the error of a difference is that of its two sides apart",
        "pipeline/stages/compare.py",
        "left = [m - mean * size for m, size in zip(more, sizes, strict=True)]",
        "left = [m.nats / math.log(2) for m in made]",
        "pipeline/test_squeeze.py::test_differences_are_paired",
    ),
    Mutation(
        "a run that goes on from a model counts as one from scratch",
        "pipeline/records.py",
        'return not recipe.sources(name)["model"] and',
        "return",
        "laws/test_plan.py::test_records_of_runs",
    ),
)
