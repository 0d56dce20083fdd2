"""Multi-head attention: H small attentions side by side, each on its own projection of the input.

    head_h = Attention(x W_q^h, x W_k^g, x W_v^g)        output = [head_1 .. head_H] W_o

with g = h for multi-head attention (Attention Is All You Need, arXiv 1706.03762), one g for all h in multi-query
attention (Fast Transformer Decoding, arXiv 1911.02150), and one g for each group of heads in grouped-query attention
(GQA, arXiv 2305.13245). Blog: Attention, MHA and its cost, GQA and MQA.
"""

from collections.abc import Callable

from torch import Tensor, nn

from llm.modules.cache import Places, empty_slots, store
from llm.modules.kernels.attention import attend
from llm.modules.masks import Mask, causal, mean_keys


class MultiHeadAttention(nn.Module):
    """Self-attention in four steps, each of which a subclass may replace: project, store, attend, output.

    n_kv_heads   key and value heads: n_heads (the default) is MHA, 1 is MQA, a divisor between is GQA
    head_dim     width of a head; d_model / n_heads where it is not given
    rope         rotates queries and keys (B, T, H, D) by their positions
    qk_norm      function head_dim -> norm layer, for query and key heads; applied before RoPE
    mask         which keys a query may see (llm/modules/masks.py)
    score_bias   (q_pos, k_pos) -> numbers added to the scores, (H, T, S) or (B, H, T, S), for any part of the positions
    scale        factor of the scores; 1 / sqrt(head_dim) where it is not given

    Called with x (B, T, d_model), positions and its cache, it returns (B, T, d_model). Positions are (T,) without a
    cache and (B, T) with one. Raises ValueError where n_kv_heads does not divide n_heads.
    """

    def __init__(
        self,
        *,
        d_model: int,
        n_heads: int,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope: nn.Module | None = None,
        qk_norm: Callable[[int], nn.Module] | None = None,
        mask: Mask = causal,
        score_bias: Callable[[Tensor, Tensor], Tensor] | None = None,
        scale: float | None = None,
        qkv_bias: bool = False,
        o_bias: bool = False,
    ):
        super().__init__()
        n_kv_heads = n_kv_heads or n_heads
        head_dim = head_dim or d_model // n_heads
        if n_heads % n_kv_heads:
            raise ValueError(f"n_kv_heads = {n_kv_heads} must divide n_heads = {n_heads} (--model.n-kv-heads)")
        self.n_heads, self.n_kv_heads, self.head_dim, self.scale = n_heads, n_kv_heads, head_dim, scale
        self.rope, self.mask, self.score_bias = rope, mask, score_bias
        self.q_proj = nn.Linear(d_model, n_heads * head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(d_model, n_kv_heads * head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(d_model, n_kv_heads * head_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(n_heads * head_dim, d_model, bias=o_bias)
        self.q_norm = qk_norm(head_dim) if qk_norm else nn.Identity()
        self.k_norm = qk_norm(head_dim) if qk_norm else nn.Identity()

    @property
    def title(self) -> str:
        """The name of the kind, for pictures."""
        kinds = {self.n_heads: "Multi-head", 1: "Multi-query"}
        return f"{kinds.get(self.n_kv_heads, 'Grouped-query')} attention"

    def forward(self, x: Tensor, positions: Tensor, cache: dict | None = None) -> Tensor:
        q, k, v = self.project(x, positions)
        k, v, places = self.store(cache, positions, k, v)
        heads = self.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), places)
        return self.output(heads, x)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, d_model) -> q (B, T, H, D), k and v (B, T, H_kv, D) as they are cached."""
        q = self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head_dim)))
        k = self.k_norm(self.k_proj(x).unflatten(-1, (-1, self.head_dim)))
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        if self.rope is not None:
            q, k = self.rope(q, positions), self.rope(k, positions)
        return q, k, v

    def store(self, cache: dict | None, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Places]:
        """Put new keys and values into the cache; returns all keys and values (B, S, H_kv, D) and their Places."""
        return store(cache, positions, k=k, v=v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, places: Places) -> Tensor:
        """q (B, H, T, D), k and v (B, H_kv, S, D) -> (B, H, T, D)."""
        return attend(q, k, v, places, self.mask, bias=self.score_bias, scale=self.scale)

    def output(self, heads: Tensor, x: Tensor) -> Tensor:
        """Join the heads (B, H, T, D) and project them: -> (B, T, d_model). `x` is the layer's input, for gates."""
        return self.o_proj(heads.transpose(1, 2).flatten(2))

    def make_cache(self, batch_size: int, length: int) -> dict[str, Tensor]:
        """Slots for `length` tokens, or for the mask's reach where that is shorter."""
        shape = (self.n_kv_heads, self.head_dim)
        return empty_slots(batch_size, min(length, self.mask.reach), self.k_proj.weight, k=shape, v=shape)

    def flops(self, context: int) -> float:
        """FLOPs per token, without the projections: queries times keys, weights times values."""
        return 4 * self.q_proj.out_features * mean_keys(self.mask, context)
