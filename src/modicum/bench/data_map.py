"""The map of data methods: every one of them in the tree of a survey of data and language models, empty cells too.

    modicum catalogue        writes docs/data-map.md with the other pages

The tree is that of Zhou et al. 2025, "A Survey of LLM x DATA", arXiv:2505.18458 (key `llm-x-data`): data for models
(processing, storage, serving) and models for data. A method stands in the cell of its port, or in the one that `CELLS`
gives its key. The survey has no method of its own; its working form beside this map is the recipe `data4llm`.
"""

from __future__ import annotations

from modicum.bench.pages import own_methods
from modicum.core.errors import unknown

TREE: dict[str, tuple[str, ...]] = {
    "processing": ("acquisition", "deduplication", "filtering", "selection", "mixing", "synthesis"),
    "storage": ("formats", "hierarchies", "kv-cache", "checkpoints"),
    "serving": ("retrieval", "post-processing", "compression", "provenance", "packing"),
    "models-for-data": ("cleaning", "integration", "discovery", "analysis", "tuning"),
}
PORTS = {
    "step": "processing/filtering",
    "rewrite": "processing/synthesis",
    "mixture": "processing/mixing",
    "experiment": "processing/mixing",
    "codec": "storage/formats",
    "order": "serving/packing",
    "packing": "serving/packing",
    "transform": "serving/provenance",
    "index": "storage/hierarchies",
    "kv": "storage/kv-cache",
    "cacheform": "storage/kv-cache",
    "retriever": "serving/retrieval",
    "reranker": "serving/post-processing",
    "reader": "serving/compression",
    "kvmemory": "serving/compression",
}
CELLS = {
    "step": {
        "exact-dedup": "processing/deduplication",
        "line-dedup": "processing/deduplication",
        "minhash": "processing/deduplication",
        "substring-dedup": "processing/deduplication",
        "decontaminate": "processing/deduplication",
        "betr": "processing/selection",
        "concept-pruning": "processing/selection",
        "dclm": "processing/selection",
        "gotd": "processing/selection",
        "infimm-webmath": "processing/selection",
        "preselect": "processing/selection",
        "random": "processing/selection",
        "cluster": "models-for-data/discovery",
        "language": "models-for-data/analysis",
        "attribute": "models-for-data/analysis",
        "score": "models-for-data/analysis",
        "ftfy": "models-for-data/cleaning",
        "normalise": "models-for-data/cleaning",
        "pii": "models-for-data/cleaning",
        "rewrite": "processing/synthesis",
        "python-split": "processing/acquisition",
    },
    "rewrite": {"restructured": "models-for-data/integration", "sam-mimicry": "models-for-data/cleaning"},
    "experiment": {"pretrainers-guide": "models-for-data/analysis", "train-once": "models-for-data/analysis"},
    "transform": {"document-number": "serving/provenance"},
}
OTHERS = {  # what no port stands for
    "processing/acquisition": "readers of crawls, files and hub data sets (`modicum curate`)",
    "storage/formats": "Parquet documents, memory-mapped token shards, safetensors, GGUF",
    "storage/checkpoints": "checkpoints with checksums, exact resume, on any number of processes",
    "storage/hierarchies": "recomputed and paged activations (port `memory`), caches on disk",
    "serving/provenance": "`modicum why`, and answers that cite their passages",
}
NOT_COVERED = "models-for-data/tuning"


def cells() -> list[str]:
    return [f"{part}/{cell}" for part, names in TREE.items() for cell in names]


def cell_of(port: str, key: str) -> str:
    """Where a method stands. Raises `UserError` with the nearest cell for one that is not of the tree."""
    cell = CELLS.get(port, {}).get(key, PORTS[port])
    if cell not in cells():
        raise unknown(f"cell of {port}/{key}", cell, cells())
    return cell


def page() -> str:
    """docs/data-map.md."""
    methods: dict[str, list[str]] = {cell: [] for cell in cells()}
    for port in PORTS:
        for key in own_methods(port):
            methods[cell_of(port, key)].append(f"[{key}](methods/{port}.md)")
    lines = [
        "# Data methods by cell",
        "",
        "Every method of the data, cache, index and retrieval ports in the tree of a survey of data and language",
        "models (Zhou et al. 2025, arXiv:2505.18458). Made by `modicum catalogue`. `modicum run data4llm` runs one of",
        "each processing cell and shows what each bought.",
    ]
    for part, names in TREE.items():
        lines += [
            "",
            f"## {part.replace('-', ' ').capitalize()}",
            "",
            "| cell | methods | beside them |",
            "|---|---|---|",
        ]
        for name in names:
            cell = f"{part}/{name}"
            empty = "not covered" if cell == NOT_COVERED else "–"
            lines.append(f"| {name} | {', '.join(methods[cell]) or empty} | {OTHERS.get(cell, '')} |")
    return "\n".join(lines) + "\n"
