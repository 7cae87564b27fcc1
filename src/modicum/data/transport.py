"""Optimal transport between two samples: the cost, and how it changes when the weights of the samples do.

    OT(a, b) = min_P sum_ij P_ij C_ij      subject to  P 1 = a, P^T 1 = b

The dual potentials f, g give the gradient: d OT / d a_i = f_i up to a constant, since the weights sum to 1. `exact`
solves the linear program (hundreds of points), `sinkhorn` the one with entropy, in the log domain (Cuturi 2013,
arXiv:1306.0895). Its cost keeps the bias of the entropy.
"""

from __future__ import annotations

import numpy as np
from scipy.special import logsumexp

DIRECT = 250.0  # range of costs, in epsilons, up to which exp(-cost / epsilon) is far from underflow


def cosine_cost(x_AD: np.ndarray, y_BD: np.ndarray) -> np.ndarray:
    """1 - cosine of every pair, AB."""
    x_AD, y_BD = (v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-12) for v in (x_AD, y_BD))
    cost_AB: np.ndarray = 1 - x_AD @ y_BD.T
    return cost_AB


def exact(cost_AB: np.ndarray, a_A: np.ndarray, b_B: np.ndarray) -> tuple[float, np.ndarray]:
    """Cost and the potential f_A, centred, by the linear program. For samples of up to a few hundred points."""
    from scipy.optimize import linprog
    from scipy.sparse import eye_array, kron

    n, m = cost_AB.shape
    rows = kron(eye_array(n), np.ones((1, m))), kron(np.ones((1, n)), eye_array(m))
    from scipy.sparse import vstack

    solution = linprog(
        cost_AB.ravel(), A_eq=vstack(rows).tocsr(), b_eq=np.concatenate([a_A, b_B]), bounds=(0, None), method="highs"
    )
    if not solution.success:
        raise ValueError(f"the transport problem was not solved: {solution.message}")
    f_A = solution.eqlin.marginals[:n]
    return float(solution.fun), f_A - float(f_A @ a_A)


def potentials(
    cost_AB: np.ndarray, a_A: np.ndarray, b_B: np.ndarray, *, epsilon: float = 0.01, iterations: int = 2000
) -> tuple[np.ndarray, np.ndarray]:
    """Potentials f_A and g_B of the entropic problem; `epsilon` is in units of the cost. Unlike those of the linear
    program they are unique up to one constant."""
    if float(cost_AB.max() - cost_AB.min()) / epsilon < DIRECT:
        return _direct(cost_AB, a_A, b_B, epsilon, iterations)
    log_a, log_b = np.log(np.maximum(a_A, 1e-300)), np.log(np.maximum(b_B, 1e-300))
    f_A, g_B = np.zeros(len(a_A)), np.zeros(len(b_B))
    for _ in range(iterations):
        f_A = soft_transform(cost_AB, g_B, log_b, epsilon)
        new_B = soft_transform(cost_AB.T, f_A, log_a, epsilon)
        moved = float(np.abs(new_B - g_B).max())
        g_B = new_B
        if moved < 1e-7 * max(epsilon, 1e-12):
            break
    return f_A, g_B


def _direct(
    cost_AB: np.ndarray, a_A: np.ndarray, b_B: np.ndarray, epsilon: float, iterations: int
) -> tuple[np.ndarray, np.ndarray]:
    """The same iteration without logarithms, some twenty times as fast, where the kernel stays within a float's
    range."""
    least = float(cost_AB.min())
    kernel_AB = np.exp((least - cost_AB) / epsilon)
    u_A, v_B = np.ones(len(a_A)), np.ones(len(b_B))
    for _ in range(iterations):
        u_A = 1 / (kernel_AB @ (v_B * b_B))
        new_B = 1 / (kernel_AB.T @ (u_A * a_A))
        moved = float(np.abs(np.log(new_B / v_B)).max())
        v_B = new_B
        if moved < 1e-7:
            break
    return epsilon * np.log(u_A) + least, epsilon * np.log(v_B)


def soft_transform(cost_AB: np.ndarray, g_B: np.ndarray, log_b: np.ndarray, epsilon: float) -> np.ndarray:
    """f_A = -epsilon logsumexp_j((g_j - c_ij) / epsilon + log b_j): the potential of any points from the other side's.

    At the optimum it gives back f of the points that were solved with, so it extends f to points that were not.
    """
    f_A: np.ndarray = -epsilon * logsumexp((g_B - cost_AB) / epsilon + log_b, axis=1)
    return f_A


def calibrated(f_A: np.ndarray) -> np.ndarray:
    """What the cost changes by when mass moves to point i evenly from all others: f_i - mean of the other f.

    For equal weights (Just et al. 2023, arXiv:2305.00054, section 3.2).
    """
    return (len(f_A) * f_A - f_A.sum()) / (len(f_A) - 1)


def sinkhorn(
    cost_AB: np.ndarray, a_A: np.ndarray, b_B: np.ndarray, *, epsilon: float = 0.01, iterations: int = 2000
) -> tuple[float, np.ndarray]:
    """Cost <P, C> of the entropic plan and its potential f_A, centred. `epsilon` is in units of the cost."""
    f_A, g_B = potentials(cost_AB, a_A, b_B, epsilon=epsilon, iterations=iterations)
    log_a, log_b = np.log(np.maximum(a_A, 1e-300)), np.log(np.maximum(b_B, 1e-300))
    plan_AB = np.exp((f_A[:, None] + g_B - cost_AB) / epsilon + log_a[:, None] + log_b)
    return float((plan_AB * cost_AB).sum()), f_A - float(f_A @ a_A)


def mixture_cost(
    sources: list[np.ndarray], fractions: np.ndarray, target_BD: np.ndarray, *, epsilon: float | None = None
) -> tuple[float, np.ndarray]:
    """Transport cost of a mixture of sources (each an A x D sample) to a target, and its gradient in the shares.

    A source's share is spread evenly over its points; the gradient is the mean of their potentials, centred over the
    shares.
    """
    x_AD = np.concatenate(sources)
    a_A = np.concatenate([np.full(len(s), w / len(s)) for s, w in zip(sources, fractions, strict=True)])
    b_B = np.full(len(target_BD), 1 / len(target_BD))
    cost_AB = cosine_cost(x_AD, target_BD)
    cost, f_A = exact(cost_AB, a_A, b_B) if epsilon is None else sinkhorn(cost_AB, a_A, b_B, epsilon=epsilon)
    ends = np.cumsum([len(s) for s in sources])
    slope = np.array([part.mean() for part in np.split(f_A, ends[:-1])])
    return cost, slope - slope.mean()


def project_simplex(p: np.ndarray) -> np.ndarray:
    """The nearest shares: not negative, summing to 1 (Duchi et al. 2008)."""
    falling = np.sort(p)[::-1]
    over = np.cumsum(falling) - 1
    count = int(np.flatnonzero(falling - over / np.arange(1, len(p) + 1) > 0)[-1]) + 1
    fractions: np.ndarray = np.maximum(p - over[count - 1] / count, 0)
    return fractions
