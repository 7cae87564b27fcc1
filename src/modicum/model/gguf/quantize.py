"""Weights into GGUF's tensor types: plain floats, blocks of 32 (Q4_0 to Q8_0) and K-quants (Q2_K to Q6_K).

A row is cut into blocks, each of which is stored as a fixed number of bytes: its scale (and minimum) in float16,
then its integers. The types of 32 are rounded as ggml's reference does, bit for bit. A K-quant's super-block of
256 has sub-blocks whose scales (and minima) are integers of their own; these are searched: for several step sizes
around range / levels the best scale by least squares is kept, and at last the two float16 factors are solved again
for the integers found. Layouts: ggml's `ggml-common.h`; dequantised value d * q (+ m), or d * sc * q (- dmin * m).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from modicum.core.errors import UserError, unknown

CHUNK = 1 << 20  # weights that are quantised at once: the candidates' intermediates stay in the cache


@dataclass(frozen=True)
class TensorType:
    """A GGUF tensor type: ggml's number, the file type of a file mostly of it, weights and bytes of a block."""

    code: int
    file_type: int
    block: int
    bytes: int

    @property
    def bits(self) -> float:
        """Bits per weight, scales included."""
        return 8 * self.bytes / self.block


TYPES = {
    "f32": TensorType(0, 0, 1, 4),
    "f16": TensorType(1, 1, 1, 2),
    "bf16": TensorType(30, 32, 1, 2),
    "q4_0": TensorType(2, 2, 32, 18),
    "q4_1": TensorType(3, 3, 32, 20),
    "q5_0": TensorType(6, 8, 32, 22),
    "q5_1": TensorType(7, 9, 32, 24),
    "q8_0": TensorType(8, 7, 32, 34),
    "q2_k": TensorType(10, 10, 256, 84),
    "q3_k": TensorType(11, 11, 256, 110),
    "q4_k": TensorType(12, 14, 256, 144),
    "q5_k": TensorType(13, 16, 256, 176),
    "q6_k": TensorType(14, 18, 256, 210),
}


def tensor_type(name: str) -> TensorType:
    if name.lower() not in TYPES:
        raise unknown("GGUF type", name, TYPES)
    return TYPES[name.lower()]


def fits(name: str, columns: int) -> bool:
    """Whether rows of `columns` weights can be stored in this type."""
    return columns % tensor_type(name).block == 0


def quantize(weight: Tensor, name: str) -> Tensor:
    """The bytes of `weight` (..., columns) in a type: uint8 (..., columns / block * bytes).

    Raises `UserError` for rows that are not whole blocks, for NaN and infinity, and for values beyond float16
    where the type stores float16.
    """
    kind = tensor_type(name)
    if not fits(name, weight.shape[-1]):
        raise UserError(f"rows of {weight.shape[-1]} weights are not whole blocks of {kind.block}, which {name} needs")
    if not bool(weight.isfinite().all()):
        raise UserError(f"the weight holds NaN or infinite values, which {name} cannot store")
    if kind.block == 1:
        plain = weight.to({"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[name.lower()])
        if not bool(plain.isfinite().all()):
            raise UserError(f"the weight holds values beyond the range of {name}; choose bf16 or f32")
        return plain.contiguous().view(torch.uint8)
    flat = weight.reshape(-1, kind.block)
    out = torch.empty(flat.shape[0], kind.bytes, dtype=torch.uint8)
    step = CHUNK // kind.block
    for start in range(0, flat.shape[0], step):
        out[start : start + step] = _ENCODERS[name.lower()](flat[start : start + step].float())
    return out.view(*weight.shape[:-1], -1)


# Blocks of 32, as ggml rounds them ------------------------------------------------------------------


def _extreme(x_NB: Tensor) -> Tensor:
    """The value of largest magnitude of each block, the first among equals: (N, 1)."""
    first = torch.from_numpy(x_NB.abs().numpy().argmax(-1))  # torch's argmax promises no order among equals
    return x_NB.gather(1, first[:, None])


def _inverse(d: Tensor) -> Tensor:
    return torch.where(d == 0, 0.0, 1 / d)


def _half(x: Tensor) -> Tensor:
    """float16 as bytes: (N, 2)."""
    half = x.half()
    if not bool(half.isfinite().all()):
        raise UserError("a block's scale is beyond the range of float16; choose the type bf16 or f32")
    return half.contiguous().view(torch.uint8)


def _nibbles(q_N32: Tensor) -> Tensor:
    """Weight i in the low half of byte i, weight i + 16 in its high half: (N, 16)."""
    return (q_N32[:, :16] & 15) | ((q_N32[:, 16:] & 15) << 4)


def _fifth_bits(q_N32: Tensor) -> Tensor:
    """Bit 4 of each, as a little-endian number of 32 bits: (N, 4)."""
    bits = (q_N32 >> 4).view(-1, 4, 8) << torch.arange(8, dtype=torch.uint8)
    return bits.sum(-1, dtype=torch.uint8)


def _symmetric(levels: int) -> Callable[[Tensor], Tensor]:
    """Q4_0 and Q5_0: d = extreme / -levels, q in [0, 2 levels), value d * (q - levels)."""

    def encode(x_NB: Tensor) -> Tensor:
        d = _extreme(x_NB) / -levels
        q = (x_NB * _inverse(d) + (levels + 0.5)).trunc().clamp_(0, 2 * levels - 1).to(torch.uint8)
        high = [_fifth_bits(q)] if levels == 16 else []
        return torch.cat([_half(d), *high, _nibbles(q)], dim=1)

    return encode


def _affine(levels: int) -> Callable[[Tensor], Tensor]:
    """Q4_1 and Q5_1: m the minimum, d = range / levels, value d * q + m."""

    def encode(x_NB: Tensor) -> Tensor:
        low = x_NB.amin(1, keepdim=True)
        d = (x_NB.amax(1, keepdim=True) - low) / levels
        q = ((x_NB - low) * _inverse(d) + 0.5).trunc().clamp_(0, levels).to(torch.uint8)
        high = [_fifth_bits(q)] if levels == 31 else []
        return torch.cat([_half(d), _half(low), *high, _nibbles(q)], dim=1)

    return encode


def on_grid(weight_OI: Tensor, d_OB: Tensor, low_OB: Tensor) -> Tensor:
    """Q4_1 with the steps and minima that are given for each block of 32: what lies on that grid stays where it is."""
    x_OBi = weight_OI.float().unflatten(1, (-1, 32))
    d, low = (v.half().float()[..., None] for v in (d_OB, low_OB))
    q = ((x_OBi - low) * _inverse(d) + 0.5).trunc().clamp_(0, 15).to(torch.uint8).flatten(0, 1)
    return torch.cat([_half(d.flatten(0, 1)), _half(low.flatten(0, 1)), _nibbles(q)], dim=1).view(len(weight_OI), -1)


def _q8_0(x_NB: Tensor) -> Tensor:
    d = x_NB.abs().amax(1, keepdim=True) / 127
    scaled = x_NB * _inverse(d)
    size = scaled.abs()
    whole = size.floor()
    q = scaled.sign() * (whole + (2 * (size - whole)).floor())  # halves away from zero
    return torch.cat([_half(d), q.to(torch.int8).view(torch.uint8)], dim=1)


# K-quants: the search --------------------------------------------------------------------------------


def _scales(x_NSB: Tensor, levels: int, steps: Tensor) -> Tensor:
    """Signed scale s_NS of each sub-block for q in [-levels, levels), least squares over the candidates' integers."""
    flat = x_NSB.abs().argmax(-1, keepdim=True)
    extreme = x_NSB.gather(-1, flat)
    best, scale = torch.zeros_like(extreme), torch.zeros_like(extreme)
    for step in steps.tolist():
        q = (x_NSB * ((levels + step) * -_inverse(extreme))).round_().clamp_(-levels, levels - 1)
        qx, qq = (q * x_NSB).sum(-1, keepdim=True), (q * q).sum(-1, keepdim=True)
        fitted = qx * _inverse(qq)
        gain = fitted * qx  # by how much this lowers the squared error from that of all zeros
        better = gain > best
        best, scale = torch.where(better, gain, best), torch.where(better, fitted, scale)
    return scale[..., 0]


def _scales_and_minima(x_NSB: Tensor, levels: int, steps: Tensor) -> tuple[Tensor, Tensor]:
    """(s_NS, m_NS), both >= 0, with x ~ s * q - m for q in [0, levels]: least squares over the candidates' integers."""
    count = x_NSB.shape[-1]
    low = x_NSB.amin(-1, keepdim=True).clamp_(max=0)
    reach = x_NSB.amax(-1, keepdim=True) - low
    sx, best = x_NSB.sum(-1, keepdim=True), torch.full_like(low, -torch.inf)
    scale, minimum = reach / levels, -low
    for step in steps.tolist():
        q = ((x_NSB - low) * ((levels + step) * _inverse(reach))).round_().clamp_(0, levels)
        qx, qq, sq = (q * x_NSB).sum(-1, keepdim=True), (q * q).sum(-1, keepdim=True), q.sum(-1, keepdim=True)
        determinant = count * qq - sq * sq
        s = (count * qx - sq * sx) * _inverse(determinant)
        m = (sq * qx - qq * sx) * _inverse(determinant)
        without = (m < 0) | (determinant <= 0)  # the minimum can only be subtracted
        s, m = torch.where(without, qx * _inverse(qq), s), torch.where(without, 0.0, m)
        gain = 2 * (s * qx - m * sx) - (s * s * qq - 2 * s * m * sq + m * m * count)
        better = (gain > best) & (s >= 0)
        best = torch.where(better, gain, best)
        scale, minimum = torch.where(better, s, scale), torch.where(better, m, minimum)
    return scale[..., 0], minimum[..., 0]


def _integers(value_NS: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """(factor_N1 in float16's values, integers_NS) whose product is near `value_NS`; extreme goes to extreme."""
    if low < 0:
        factor = _extreme(value_NS) / low
    else:
        factor = value_NS.amax(1, keepdim=True) / high
    factor = factor.half().float()
    return factor, (value_NS * _inverse(factor)).round_().clamp_(low, high)


def _nearest(x_NSB: Tensor, scale_NS: Tensor, minimum_NS: Tensor | None, low: int, high: int) -> Tensor:
    shifted = x_NSB if minimum_NS is None else x_NSB + minimum_NS[..., None]
    return (shifted * _inverse(scale_NS)[..., None]).round_().clamp_(low, high)


def _fit_symmetric(x_N: Tensor, levels: int, scale_low: int, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(d_N1, sc_NS, q_N256) of sub-blocks of 16: x ~ d * sc * q."""
    x_NSB = x_N.view(-1, 16, 16)
    d, sc = _integers(_scales(x_NSB, levels, steps), scale_low, -scale_low - 1)
    q = _nearest(x_NSB, d * sc, None, -levels, levels - 1)
    unit = sc[..., None] * q
    again = ((unit * x_NSB).sum((1, 2)) * _inverse((unit * unit).sum((1, 2))))[:, None].half().float()
    q_again = _nearest(x_NSB, again * sc, None, -levels, levels - 1)
    better = _error(x_NSB, again * sc, None, q_again) < _error(x_NSB, d * sc, None, q)
    return (
        torch.where(better[:, None], again, d),
        sc,
        torch.where(better[:, None, None], q_again, q).flatten(1),
    )


def _fit_affine(
    x_N: Tensor, sub: int, levels: int, most: int, steps: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(d_N1, dmin_N1, sc_NS, m_NS, q_N256) of sub-blocks of `sub`: x ~ d * sc * q - dmin * m."""
    x_NSB = x_N.view(x_N.shape[0], -1, sub)
    scale, minimum = _scales_and_minima(x_NSB, levels, steps)
    (d, sc), (dmin, m) = _integers(scale, 0, most), _integers(minimum, 0, most)
    q = _nearest(x_NSB, d * sc, dmin * m, 0, levels)
    unit, shift = sc[..., None] * q, -m[..., None].expand_as(q)
    uu, ss, us = ((a * b).sum((1, 2)) for a, b in ((unit, unit), (shift, shift), (unit, shift)))
    ux, sx = (unit * x_NSB).sum((1, 2)), (shift * x_NSB).sum((1, 2))
    inverse = _inverse(uu * ss - us * us)
    d2, dmin2 = ((ss * ux - us * sx) * inverse, (uu * sx - us * ux) * inverse)
    d2, dmin2 = (v[:, None].clamp(min=0).half().float() for v in (d2, dmin2))
    q2 = _nearest(x_NSB, d2 * sc, dmin2 * m, 0, levels)
    better = (_error(x_NSB, d2 * sc, dmin2 * m, q2) < _error(x_NSB, d * sc, dmin * m, q))[:, None]
    d, dmin = torch.where(better, d2, d), torch.where(better, dmin2, dmin)
    return d, dmin, sc, m, torch.where(better[..., None], q2, q).flatten(1)


def _error(x_NSB: Tensor, scale_NS: Tensor, minimum_NS: Tensor | None, q_NSB: Tensor) -> Tensor:
    off = scale_NS[..., None] * q_NSB - x_NSB
    if minimum_NS is not None:
        off -= minimum_NS[..., None]
    return (off * off).sum((1, 2))


# K-quants: the bytes ---------------------------------------------------------------------------------


def _two_bits(q_N256: Tensor) -> Tensor:
    """Weights i, i + 32, i + 64, i + 96 of each half in byte i, lowest first: (N, 64)."""
    parts = (q_N256 & 3).view(-1, 2, 4, 32) << torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    return parts.sum(2, dtype=torch.uint8).flatten(1)


def _one_bit(bit_N256: Tensor) -> Tensor:
    """Bit b of byte i is that of weight 32 b + i: (N, 32)."""
    parts = bit_N256.view(-1, 8, 32) << torch.arange(8, dtype=torch.uint8)[:, None]
    return parts.sum(1, dtype=torch.uint8)


def _four_bits(q_N256: Tensor, run: int) -> Tensor:
    """Low halves of bytes from one run of weights, high halves from the next: (N, 128)."""
    pairs = (q_N256 & 15).view(q_N256.shape[0], -1, 2, run)
    return (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).flatten(1)


def _six_bit_pairs(sc_N8: Tensor, m_N8: Tensor) -> Tensor:
    """Eight scales and eight minima of six bits: (N, 12)."""
    first = [(v[:, :4] & 63) | ((v[:, 4:] >> 4) << 6) for v in (sc_N8, m_N8)]
    return torch.cat([*first, (sc_N8[:, 4:] & 15) | ((m_N8[:, 4:] & 15) << 4)], dim=1)


def _bytes(x: Tensor) -> Tensor:
    return x.to(torch.uint8)


def _q2_k(x_N: Tensor) -> Tensor:
    d, dmin, sc, m, q = _fit_affine(x_N, 16, 3, 15, torch.arange(-0.5, 1.05, 0.1))
    return torch.cat([_bytes(sc) | (_bytes(m) << 4), _two_bits(_bytes(q)), _half(d), _half(dmin)], dim=1)


def _q3_k(x_N: Tensor) -> Tensor:
    d, sc, q = _fit_symmetric(x_N, 4, -32, torch.arange(-0.9, 0.95, 0.1))
    stored, scale = _bytes(q + 4), _bytes(sc + 32)
    low = (scale[:, :8] & 15) | ((scale[:, 8:] & 15) << 4)
    high = ((scale >> 4).view(-1, 4, 4) << torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]).sum(
        1, dtype=torch.uint8
    )
    return torch.cat([_one_bit(stored >> 2), _two_bits(stored), low, high, _half(d)], dim=1)


def _q4_k(x_N: Tensor) -> Tensor:
    d, dmin, sc, m, q = _fit_affine(x_N, 32, 15, 63, torch.arange(-1.0, 1.05, 0.1))
    return torch.cat([_half(d), _half(dmin), _six_bit_pairs(_bytes(sc), _bytes(m)), _four_bits(_bytes(q), 32)], dim=1)


def _q5_k(x_N: Tensor) -> Tensor:
    d, dmin, sc, m, q = _fit_affine(x_N, 32, 31, 63, torch.arange(-0.5, 1.05, 0.1))
    stored = _bytes(q)
    scales = _six_bit_pairs(_bytes(sc), _bytes(m))
    return torch.cat([_half(d), _half(dmin), scales, _one_bit(stored >> 4), _four_bits(stored, 32)], dim=1)


def _q6_k(x_N: Tensor) -> Tensor:
    d, sc, q = _fit_symmetric(x_N, 32, -128, torch.arange(-0.9, 0.95, 0.1))
    stored = _bytes(q + 32)
    scale = sc.to(torch.int8).view(torch.uint8)
    return torch.cat([_four_bits(stored, 64), _two_bits(stored >> 4), scale, _half(d)], dim=1)


_ENCODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "q4_0": _symmetric(8),
    "q4_1": _affine(15),
    "q5_0": _symmetric(16),
    "q5_1": _affine(31),
    "q8_0": _q8_0,
    "q2_k": _q2_k,
    "q3_k": _q3_k,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
}
