"""Room bench: the evidence. What one measurement is for every port, and what is drawn from the records.

A bench is `bench/ports/PORT.py`, found by its place (a dash in the port's name is an underscore in the
file's). `harness` runs it, `labs` says which measurements may be compared, `code` which files are behind one, `record`
keeps what was measured, `todo` says what is missing or stale, `stats` compares, `plots` draws, `catalogue`
writes the README's table and docs/methods, `conformance` asks of every method what its port
asks of all, `scaffold` starts a new method.
"""
