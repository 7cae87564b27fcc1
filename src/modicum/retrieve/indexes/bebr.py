"""bebr: recurrent binary codes, compared by integer arithmetic.

A vector f becomes a sum of sign vectors. Each loop reads the code so far back into the original space and encodes the
sign of what is missing:

    b_0 = sgn(W_0 f)        r_t = sgn(W_{t+1} (f - unit(R_t b_t)))        b_{t+1} = b_t + 2^-(t+1) r_t

sgn(0) = -1. After u loops b takes 2^(u+1) equally spaced values per dimension: m (u + 1) bits. Both sides are codes,
compared without decoding (symmetric distance): of scaled codes 2^u b the inner product is a sum of 4^u-weighted sign
products, each m - 2 popcount(x xor y), exact in integers and divided once by the two stored norms. W and R are one
hidden layer beside a linear path, trained with InfoNCE on unit(b), key the momentum copy of the network, a queue of
older keys of which the nearest by float similarity serve as negatives, sgn's gradient that of the clipped identity:

    L = -ln e^{p(f) p'(f) / tau} / (e^{p(f) p'(f) / tau} + sum over the hard queue of e^{p(f) p'(f-) / tau})

Gan et al. 2023, arXiv:2302.08714 (KDD), section 3. Knobs of the published models were not available: the defaults are
this file's. Departs: where only documents exist, a key is the code of the document itself under small noise; all W
start from one rotation by iterative quantization (Gong and Lazebnik 2011), so that later signs refine the same
coordinates; a mean-squared term
on unit(R b) - f, weight `recall`, trains the last reading. With `rescore` the best candidates are compared exactly
with the vectors on disk; 0 gives the codes' own ranking.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from modicum.budget.cost import Cost
from modicum.retrieve.indexes._stored import BLOCK, Stored, rescored


@dataclass(frozen=True, kw_only=True)
class Config:
    loops: Annotated[int, Field(ge=0, le=3)] = 1  # u; 0: one sign per dimension
    bits: Annotated[int, Field(ge=8)] | None = None  # of a code; None: (u + 1) D, rounded up to whole bytes per loop
    steps: Annotated[int, Field(ge=0)] = 300  # training steps; 0: the initial rotation
    batch: Annotated[int, Field(ge=2)] = 256
    lr: Annotated[float, Field(gt=0)] = 5e-4
    tau: Annotated[float, Field(gt=0)] = 0.07  # temperature
    queue: Annotated[int, Field(ge=1)] = 4096  # older keys
    hard: Annotated[int, Field(ge=1)] = 256  # of which the nearest serve as negatives
    momentum: Annotated[float, Field(ge=0, le=1)] = 0.999
    noise: Annotated[float, Field(ge=0)] = 0.3  # length of the noise on a key's vector
    recall: Annotated[float, Field(ge=0)] = 1.0  # weight of the reconstruction
    sample: Annotated[int, Field(ge=1)] = 32768  # vectors the network is trained on
    rescore: Annotated[float, Field(ge=0)] = 0.0  # times k candidates that are compared exactly; 0: none
    seed: int = 0


TOY = Config(steps=2, rescore=1e9)
SWEEP = ("loops=0", "loops=1", "loops=3")


class BEBR(Stored):
    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.network: Any = None
        self.signs_NTW = np.empty((0, 0, 0), np.uint64)  # packed bits of b_0, r_0, r_1, ... of every row
        self.norm_N = np.empty(0, np.float32)  # of the scaled code
        self.width = 0  # m

    def _width(self, dim: int) -> int:
        per_loop = (self.config.bits or (self.config.loops + 1) * dim) // (self.config.loops + 1)
        return max(8, -(-per_loop // 8) * 8)

    def _words(self, dim: int) -> int:
        return -(-self._width(dim) // 64)

    def cost(self, n_vectors: int, dim: int) -> Cost:
        c = self.config
        code = (c.loops + 1) * 8 * self._words(dim) + 4
        network = 4 * (2 * c.loops + 1) * (3 * dim * self._width(dim))
        training = 4 * dim * min(n_vectors, c.sample) + 8 * c.queue * (dim + self._width(dim)) + 6 * network
        return Cost(
            peak_bytes=n_vectors * (code + 16) + training, disk_bytes=n_vectors * (code + 16 + 4 * dim) + network
        )

    def resident_bytes(self) -> int:
        """Codes, norms, network, ids; the vectors stay on disk, for rescoring and rebuilding."""
        network = 0 if self.network is None else sum(4 * p.numel() for p in self.network.parameters())
        return int(network + self.signs_NTW.nbytes + self.norm_N.nbytes + self.table_bytes())

    def _structure(self, flat_ND: np.ndarray) -> None:
        from modicum.retrieve.indexes import _binary

        c, dim = self.config, flat_ND.shape[1]
        self.width = self._width(dim)
        rows = np.sort(np.random.default_rng(c.seed).permutation(len(flat_ND))[: c.sample])
        self.network = _binary.trained(np.asarray(flat_ND[rows], np.float32), self.width, c)
        parts = [self._encode(np.asarray(flat_ND[i : i + BLOCK], np.float32)) for i in range(0, len(flat_ND), BLOCK)]
        self.signs_NTW = np.concatenate([signs for signs, _ in parts])
        self.norm_N = np.concatenate([norms for _, norms in parts])

    def _encode(self, x_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(packed signs_NTW, norms_N of the scaled codes)."""
        from modicum.retrieve.indexes import _binary

        positive_NTM = _binary.signs(self.network, x_ND) > 0
        scaled_NM = scaled(positive_NTM)
        return packed(positive_NTM), np.sqrt((scaled_NM**2).sum(1)).astype(np.float32)

    def _probe(self, queries_QD: np.ndarray, k: int, alive_N: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        signs_QTW, norm_Q = self._encode(queries_QD)
        n = len(self.flat_ND)
        count = min(n, max(k, int(min(k * self.config.rescore, n))))
        rows_QC = np.full((len(queries_QD), count), -1, np.int64)
        scores_QC = np.full((len(queries_QD), count), -np.inf, np.float32)
        for q, signs_TW in enumerate(signs_QTW):
            scores_N = symmetric(signs_TW, self.signs_NTW, self.width) / (norm_Q[q] * self.norm_N)
            if alive_N is not None:
                scores_N = np.where(alive_N, scores_N, -np.inf)
            best = np.argpartition(-scores_N, count - 1)[:count] if count < n else np.arange(n)
            best = best[np.argsort(-scores_N[best], kind="stable")]
            real = np.isfinite(scores_N[best])
            rows_QC[q, real], scores_QC[q, real] = best[real], scores_N[best[real]]
        return rescored(self, queries_QD, rows_QC, scores_QC) if self.config.rescore else (rows_QC, scores_QC)

    def _write_structure(self, folder: Path) -> None:
        from safetensors.torch import save_file

        np.save(folder / "signs.npy", self.signs_NTW)
        np.save(folder / "norms.npy", self.norm_N)
        save_file(self.network.state_dict(), folder / "network.safetensors")

    def _read_structure(self, folder: Path) -> None:
        from safetensors.torch import load_file

        from modicum.retrieve.indexes import _binary

        dim = self.flat_ND.shape[1]
        self.width = self._width(dim)
        self.network = _binary.Binary(dim, self.width, self.config.loops)
        self.network.load_state_dict(load_file(folder / "network.safetensors"))
        self.signs_NTW = np.load(folder / "signs.npy", allow_pickle=False)
        self.norm_N = np.load(folder / "norms.npy", allow_pickle=False)


def scaled(positive_NTM: np.ndarray) -> np.ndarray:
    """2^u b, integers (float64 for exact sums): sum over t of 2^(u - t) times the signs."""
    loops = positive_NTM.shape[1] - 1
    weight_T = 2.0 ** (loops - np.arange(loops + 1))
    return np.einsum("t,ntm->nm", weight_T, np.where(positive_NTM, 1.0, -1.0))


def packed(positive_NTM: np.ndarray) -> np.ndarray:
    """words_NTW, uint64; bits beyond m are 0 on both sides and so count as equal, see `symmetric`."""
    n, loops, m = positive_NTM.shape
    words = -(-m // 64)
    bytes_NTB = np.zeros((n, loops, 8 * words), np.uint8)
    bytes_NTB[:, :, : -(-m // 8)] = np.packbits(positive_NTM, axis=-1, bitorder="little")
    return bytes_NTB.view(np.uint64)


def symmetric(query_TW: np.ndarray, codes_NTW: np.ndarray, m: int) -> np.ndarray:
    """products_N, int64, of scaled codes: sum over i, j of 2^(2u - i - j) (m - 2 popcount(q_i xor c_j))."""
    last = len(query_TW) - 1
    products_N = np.zeros(len(codes_NTW), np.int64)
    for j in range(last + 1):
        codes_NW = codes_NTW[:, j]
        for i in range(last + 1):
            differ_N = np.bitwise_count(codes_NW ^ query_TW[i]).sum(1, dtype=np.int64)
            products_N += (m - 2 * differ_N) << (2 * last - i - j)
    return products_N
