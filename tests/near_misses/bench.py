"""Near misses of room bench."""

from near_misses import Mutation

MUTATIONS = (
    # bench: evidence
    Mutation(
        "imports within functions are not followed",
        "bench/code.py",
        "        else:\n            yield from _imports(node)",
        "        elif isinstance(node, ast.If | ast.Try):\n            yield from _imports(node)",
        "bench/test_code.py::test_imports_are_read_as_text",
    ),
    Mutation(
        "any record of the lab is taken on resuming, whatever code made it",
        "bench/harness.py",
        "if r.lab.id == lab.id and r.code == codes.get(r.method) and",
        "if r.lab.id == lab.id and",
        "bench/test_code.py::test_other_code_is_measured_again_and_takes_the_place_of_the_old",
    ),
    Mutation(
        "rows of two labs are joined",
        "bench/figures.py",
        "groups.setdefault(record.lab.id, []).append(record)",
        "groups.setdefault(record.lab.settings, []).append(record)",
        "bench/test_catalogue.py::test_each_lab_is_a_table_of_its_own",
    ),
)
