"""softmax: multi-head attention with shared key/value heads, under a window or pattern.

    y = o(concat over heads of softmax(scale * q k^T + mask) v),   q, k, v linear in x, q and k rotated

Vaswani et al. 2017, arXiv:1706.03762, section 3.2; shared heads: Ainslie et al. 2023, arXiv:2305.13245.
Shapes: B batch, T tokens, D width, H query heads, G key/value heads, E head_dim.
"""

from __future__ import annotations

from torch import Tensor, nn

from modicum.model.attend import Attend
from modicum.model.config import DecoderConfig, LayerConfig, softmax_others, softmax_weights
from modicum.model.mixers import Mixer, Rotation
from modicum.model.norms import make_norm
from modicum.model.patterns import pattern
from modicum.model.rope import rotate


class Softmax(Mixer):
    """Multi-head attention with shared key/value heads (Ainslie et al. 2023, arXiv:2305.13245).

    What a query may see, and where keys and values are kept, is the business of the `attend` it is given.
    """

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__(config, layer)
        c = config.per_layer[layer]
        self.head_dim, self.qk_norm = c.head_dim, c.qk_norm
        self.window, self.scale, self.softcap = c.window, c.attention_scale, c.attention_softcap
        self.pattern = None if c.attention is None else pattern(c.attention)
        heads, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
        self.q = nn.Linear(config.width, heads, bias=c.qkv_bias)
        self.k = nn.Linear(config.width, kv, bias=c.qkv_bias)
        self.v = nn.Linear(config.width, kv, bias=c.qkv_bias)
        self.o = nn.Linear(heads, config.width, bias=c.o_bias)
        if self.qk_norm:
            per_head = self.qk_norm == "head"
            self.q_norm = make_norm(config, c.head_dim if per_head else heads)
            self.k_norm = make_norm(config, c.head_dim if per_head else kv)

    def forward(self, x_BTD: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        return self.o(self.heads(x_BTD, rotation, attend))

    def heads(self, x_BTD: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        """What the heads give, side by side: (B, T, H E)."""
        B, T, _ = x_BTD.shape
        q, k, v = self.q(x_BTD), self.k(x_BTD), self.v(x_BTD)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q_BHTE, k_BGTE, v_BGTE = (y.view(B, T, -1, self.head_dim).transpose(1, 2) for y in (q, k, v))
        if self.qk_norm == "head":
            q_BHTE, k_BGTE = self.q_norm(q_BHTE), self.k_norm(k_BGTE)
        if rotation is not None:
            q_BHTE, k_BGTE = rotate(q_BHTE, *rotation), rotate(k_BGTE, *rotation)
        more = {} if self.pattern is None else {"pattern": self.pattern}
        out_BHTE = attend(
            self.layer, q_BHTE, k_BGTE, v_BGTE, window=self.window, scale=self.scale, softcap=self.softcap, **more
        )
        return out_BHTE.transpose(1, 2).reshape(B, T, -1)

    @classmethod
    def matmul_weights(cls, layer: LayerConfig, width: int) -> int:
        return softmax_weights(layer, width)

    @classmethod
    def other_parameters(cls, layer: LayerConfig, width: int) -> int:
        return softmax_others(layer, width)
