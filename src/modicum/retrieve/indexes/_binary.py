"""The network of `bebr`: vectors to recurrent binary codes, and its training.

Shape letters: N vectors, D their width, M width of a code, K queued keys, H hard negatives.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Sign(torch.autograd.Function):
    """-1 or 1, with sgn(0) = -1; the gradient passes where |x| <= 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.where(x > 0, 1.0, -1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (x.abs() <= 1)


class Block(nn.Module):
    """A linear path and, beside it, one hidden layer that starts at zero."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)
        self.inner = nn.Linear(inputs, inputs)
        self.outer = nn.Linear(inputs, outputs)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.outer(F.relu(self.inner(x)))


class Binary(nn.Module):
    """W_0 ... W_u and R_0 ... R_{u-1}."""

    def __init__(self, dim: int, width: int, loops: int):
        super().__init__()
        self.loops = loops
        self.encode: Any = nn.ModuleList(Block(dim, width) for _ in range(loops + 1))
        self.decode: Any = nn.ModuleList(Block(width, dim) for _ in range(max(loops, 1)))

    def forward(self, f_ND: Tensor) -> tuple[Tensor, Tensor]:
        """(b_NM after the last loop, signs_NTM: b_0 and every r_t)."""
        b_NM = Sign.apply(self.encode[0](f_ND))
        signs = [b_NM]
        for t in range(self.loops):
            read_ND = F.normalize(self.decode[t](b_NM), dim=-1)
            r_NM = Sign.apply(self.encode[t + 1](f_ND - read_ND))
            b_NM = b_NM + 2.0 ** -(t + 1) * r_NM
            signs.append(r_NM)
        return b_NM, torch.stack(signs, dim=1)


def signs(network: Binary, x_ND: np.ndarray) -> np.ndarray:
    """signs_NTM of vectors, made of length 1 first."""
    with torch.inference_mode():
        return network(F.normalize(torch.from_numpy(np.array(x_ND, np.float32)), dim=-1))[1].numpy()


def rotation(x_ND: np.ndarray, width: int, seed: int, rounds: int = 30) -> np.ndarray:
    """weight_MD whose signs lose little of x: iterative quantization, in blocks of D rows with starts of their own.

    B = sgn(X R),   R = U V^T of the SVD of X^T B          (Gong and Lazebnik 2011)
    """
    dim = x_ND.shape[1]
    blocks = []
    rng = np.random.default_rng(seed)
    for _ in range(-(-width // dim)):
        r_DD = np.linalg.qr(rng.standard_normal((dim, dim)))[0].astype(np.float32)
        for _ in range(rounds if len(x_ND) > dim else 0):
            u, _, vt = np.linalg.svd(x_ND.T @ np.where(x_ND @ r_DD > 0, 1.0, -1.0).astype(np.float32))
            r_DD = u @ vt
        blocks.append(r_DD.T)
    return np.concatenate(blocks)[:width].astype(np.float32)


def trained(x_ND: np.ndarray, width: int, config: Any) -> Binary:
    """A network for these vectors; see the card of `bebr`."""
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        network = Binary(x_ND.shape[1], width, config.loops)
        f_ND = F.normalize(torch.from_numpy(x_ND), dim=-1)
        _start(network, f_ND[:8192], width, config.seed)
        if config.steps:
            _train(network, f_ND, config)
    return network.eval()


@torch.no_grad()
def _start(network: Binary, f_ND: Tensor, width: int, seed: int) -> None:
    """Linear paths: W_t by iterative quantization, R_t by least squares."""
    missing_ND, b_NM = f_ND, torch.zeros(len(f_ND), width)
    weight_MD = torch.from_numpy(rotation(f_ND.numpy(), width, seed)) * f_ND.shape[1] ** 0.5
    for t, block in enumerate(network.encode):  # one rotation for all, so that later signs refine the same coordinates
        block.linear.weight.copy_(weight_MD * 2.0**t)
        b_NM = b_NM + 2.0**-t * Sign.apply(block.linear(missing_ND))
        if t < len(network.decode):
            ridge = b_NM.T @ b_NM + len(b_NM) * torch.eye(width)  # heavy: few vectors must not be learnt by heart
            read_DM = torch.linalg.solve(ridge, b_NM.T @ f_ND).T
            network.decode[t].linear.weight.copy_(read_DM)
            missing_ND = f_ND - F.normalize(b_NM @ read_DM.T, dim=-1)


def _train(network: Binary, f_ND: Tensor, c: Any) -> None:
    import copy

    slow = copy.deepcopy(network).requires_grad_(False)
    generator = torch.Generator().manual_seed(c.seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=c.lr)
    queue_KD, queue_KM = torch.empty(0, f_ND.shape[1]), torch.empty(0, 0)
    for step in range(c.steps):
        for group in optimizer.param_groups:
            group["lr"] = c.lr * (1 - step / c.steps)
        rows = torch.randint(len(f_ND), (min(c.batch, len(f_ND)),), generator=generator)
        batch_ND = f_ND[rows]
        with torch.no_grad():
            shift_ND = torch.randn(batch_ND.shape, generator=generator) * (c.noise / batch_ND.shape[1] ** 0.5)
            key_NM = F.normalize(slow(F.normalize(batch_ND + shift_ND, dim=-1))[0], dim=-1)
        b_NM, _ = network(batch_ND)
        anchor_NM = F.normalize(b_NM, dim=-1)
        logits = (anchor_NM * key_NM).sum(1, keepdim=True)
        if len(queue_KM):
            near_NK = batch_ND @ queue_KD.T
            near_NK[near_NK > 0.999] = -1.0  # the document itself, drawn before
            hard_NH = near_NK.topk(min(c.hard, len(queue_KM)), dim=1).indices
            logits = torch.cat([logits, torch.einsum("nm,nhm->nh", anchor_NM, queue_KM[hard_NH])], dim=1)
        loss = F.cross_entropy(logits / c.tau, torch.zeros(len(logits), dtype=torch.int64))
        if network.loops and c.recall:
            read_ND = F.normalize(network.decode[-1](b_NM), dim=-1)
            loss = loss + c.recall * (read_ND - batch_ND).pow(2).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for p, q in zip(slow.parameters(), network.parameters(), strict=True):
                p.lerp_(q, 1 - c.momentum)
        queue_KD = torch.cat([batch_ND, queue_KD])[: c.queue]
        queue_KM = torch.cat([key_NM, queue_KM])[: c.queue] if len(queue_KM) else key_NM
