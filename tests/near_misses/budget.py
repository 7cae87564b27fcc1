"""Near misses of room budget."""

from near_misses import Mutation

MUTATIONS = (
    Mutation(
        "a control group's limit is taken for what is left of it",
        "budget/machine.py",
        "headroom = [max(0, limit - used) for limit, used in _memory_groups(Path(root))]",
        "headroom = [limit for limit, used in _memory_groups(Path(root))]",
        "budget/test_machine.py::test_a_container_sees_its_limit_and_what_is_left_of_it",
    ),
)
