"""Run tables for laws of which no published table has rows: small decoders and adaptations made here, and what they
reach.

    python -m modicum.bench.law_runs repeated --out evidence/runs --seeds 0,1,2
    python -m modicum.bench.law_runs mixed --data FOLDER --domain specs_python --out evidence/runs
    python -m modicum.bench.law_runs pruned --out evidence/runs
    python -m modicum.bench.law_runs mixtures --data FOLDER --out evidence/runs
    python -m modicum.bench.law_runs examples --data banking77.parquet --out evidence/runs

One file makes one table. It has `SCALE`, `SMALL` (seconds, for tests) and `rows(settings, seed, done, domain)`, which
gives the rows of one run after another and leaves out those named in `done`. `modicum bench law --data evidence/runs
--scale protocol=TABLE` reads them.
"""
