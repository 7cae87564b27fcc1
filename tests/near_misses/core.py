"""Near misses of room core."""

from near_misses import Mutation

MUTATIONS = (
    Mutation(
        "what a method brings replaces what was chosen",
        "core/compose.py",
        "(c.method == half.method or not several)",
        "c.method == half.method",
        "core/test_compose.py::test_what_was_chosen_keeps_out_what_is_brought_where_a_port_takes_one_method",
    ),
)
