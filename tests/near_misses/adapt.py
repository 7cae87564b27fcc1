"""Near misses of room adapt."""

from near_misses import Mutation

MUTATIONS = (
    Mutation(
        "an adapter of inputs comes back to the first columns",
        "adapt/recover.py",
        "target.A[:, positions(weights[name].T, whole[name].T, name)] = a_RI.to(target.A.dtype)",
        "target.A[:, : a_RI.shape[1]] = a_RI.to(target.A.dtype)",
        "compress/test_loram.py::test_an_adapter_comes_back_to_its_rows_and_columns",
    ),
)
