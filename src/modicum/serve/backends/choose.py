"""Which backends an engine has."""

from __future__ import annotations

from modicum.core.errors import UserError
from modicum.model.decoder import Decoder
from modicum.serve import native
from modicum.serve.backends import Backend, Runner
from modicum.serve.backends.flex import Flex, wanted
from modicum.serve.backends.graphs import Graphs, unfit
from modicum.serve.backends.native import Native
from modicum.serve.backends.routed import Routing, has_routers
from modicum.serve.backends.torch import Torch
from modicum.serve.native.support import unserved, unserved_in_eight
from modicum.serve.pages import Storage
from modicum.serve.table import BlockTable


def make_runner(
    model: Decoder, storage: Storage, table: BlockTable, cuda_graphs: bool = True, activation_bits: int = 16
) -> Runner:
    """Raises `UserError` if `activation_bits` asks for kernels that cannot be had."""
    library = native.library()
    lacking = native.reason() if library is None else unserved(model, storage.form.dtype)
    if lacking is None and storage.form.native is None:
        lacking = "a cache in codes that the kernels do not read"
    eight = activation_bits == 8
    if eight and (lacking := lacking or unserved_in_eight(model)):
        raise UserError(
            f"activation_bits=8 works with the kernels for the CPU and int8 or int4 matrices; here: {lacking}; "
            "mend that (see `modicum doctor`), or leave activation_bits out"
        )
    last = Torch(model)
    if has_routers(model):
        last.routing, lacking = Routing(model), "layers with routers"
    backends: list[Backend] = [last]
    if model.device.type == "cuda":
        if last.routing is None and cuda_graphs and storage.plain and unfit(model) is None:
            backends.insert(0, Graphs(model, storage, table))
    elif library is not None and lacking is None:
        backends.insert(0, Native(model, storage, library, eight))
    if last.routing is None and (flex := wanted()) is not None:
        backends.insert(len(backends) - 1 if model.device.type == "cuda" else 0, Flex(model, flex == "compiled"))
    return Runner(*backends)
