"""Multi-head latent attention (MLA): keys and values of all heads are computed from one short vector per token.

    c = norm(x W_kv_a)                   the latent; the cache holds only c and the small rotated key r
    k_h = [c W_uk^h | r]                 r = RoPE(x W_kr): the part of the key that RoPE rotates, shared by all heads
    v_h = c W_uv^h
    q_h = [q_nope^h | RoPE(q_rope^h)]    head_h = Attention(q_h, k_h, v_h)

Since q_nope . (c W_uk) = (q_nope W_uk^T) . c, decoding multiplies the query by W_uk^T and applies W_uv after the
weighted mean. So all heads attend to the latents directly. If RoPE also rotated c W_uk, a rotation would stand between
the query and W_uk, and this would not work. Therefore RoPE has separate channels, r.

DeepSeek-V2, arXiv 2405.04434, section 2.1; DeepSeek-V3 Technical Report, arXiv 2412.19437. Blog: Attention, MLA.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm.modules.cache import Places, empty_slots, store
from llm.modules.kernels.attention import attend
from llm.modules.masks import Mask, causal, mean_keys
from llm.modules.norms import RMSNorm


class LatentAttention(nn.Module):
    """(B, T, d_model) -> (B, T, d_model). Query and key heads have qk_nope_head_dim + qk_rope_head_dim channels.

    kv_lora_rank   width of the cached latent
    rope           rotates the last qk_rope_head_dim channels, (B, T, H, D); DeepSeek rotates interleaved pairs.
                   None: no rotation
    q_lora_rank    width of a latent from which the queries are computed; None: one full projection
    norm_eps       epsilon of the norms on the latents; every DeepSeek model uses 1e-6, even if its other norms differ
    scale          factor of the scores; default: 1 / sqrt(qk_nope_head_dim + qk_rope_head_dim).
                   DeepSeek with YaRN multiplies the default by the square of yarn_mscale
    mask           which keys a query may see (llm/modules/masks.py)

    Without a cache, `attend_expanded` computes the keys and values of all heads. With a cache, which holds only latents
    and rotated keys, `attend_absorbed` attends to these directly.
    """

    def __init__(
        self,
        *,
        d_model: int,
        n_heads: int,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        rope: nn.Module | None,
        q_lora_rank: int | None = None,
        norm_eps: float = 1e-6,
        scale: float | None = None,
        mask: Mask = causal,
    ):
        super().__init__()
        self.n_heads, self.rope, self.mask = n_heads, rope, mask
        self.kv_split = [kv_lora_rank, qk_rope_head_dim]
        self.q_split = [qk_nope_head_dim, qk_rope_head_dim]
        self.expanded_split = [qk_nope_head_dim, v_head_dim]
        self.scale = sum(self.q_split) ** -0.5 if scale is None else scale
        self.q_lora_rank = q_lora_rank
        if q_lora_rank is None:
            self.q_proj = nn.Linear(d_model, n_heads * sum(self.q_split), bias=False)
        else:
            self.q_a_proj = nn.Linear(d_model, q_lora_rank, bias=False)
            self.q_a_norm = RMSNorm(q_lora_rank, norm_eps)
            self.q_b_proj = nn.Linear(q_lora_rank, n_heads * sum(self.q_split), bias=False)
        self.kv_a_proj = nn.Linear(d_model, sum(self.kv_split), bias=False)
        self.kv_a_norm = RMSNorm(kv_lora_rank, norm_eps)
        self.kv_b_proj = nn.Linear(kv_lora_rank, n_heads * sum(self.expanded_split), bias=False)
        self.o_proj = nn.Linear(n_heads * v_head_dim, d_model, bias=False)

    def forward(self, x: Tensor, positions: Tensor, cache: dict | None = None) -> Tensor:
        q_nope, q_rope = self.queries(x, positions)
        latent, k_rope = self.compress(x, positions)
        latent, k_rope, places = store(cache, positions, latent=latent, k_rope=k_rope)
        attend_to = self.attend_expanded if cache is None else self.attend_absorbed
        heads = attend_to(q_nope, q_rope, latent, k_rope, places)  # (B, T, H, v_head_dim)
        return self.o_proj(heads.flatten(2))

    def queries(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, d_model) -> the part without RoPE (B, T, H, nope) and the rotated part (B, T, H, rope)."""
        q = self.q_proj(x) if self.q_lora_rank is None else self.q_b_proj(self.q_a_norm(self.q_a_proj(x)))
        q_nope, q_rope = q.unflatten(-1, (self.n_heads, -1)).split(self.q_split, -1)
        return q_nope, q_rope if self.rope is None else self.rope(q_rope, positions)

    def compress(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, d_model) -> the cached tensors: normed latent (B, T, kv_lora_rank), rotated key (B, T, rope)."""
        latent, k_rope = self.kv_a_proj(x).split(self.kv_split, -1)
        if self.rope is not None:
            k_rope = self.rope(k_rope[:, :, None], positions)[:, :, 0]
        return self.kv_a_norm(latent), k_rope

    def attend_expanded(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, places: Places) -> Tensor:
        """Multi-head attention with keys and values computed from the latents: -> (B, T, H, v_head_dim)."""
        k_nope, v = self.kv_b_proj(latent).unflatten(-1, (self.n_heads, -1)).split(self.expanded_split, -1)
        k_rope = k_rope[:, :, None].expand(-1, -1, self.n_heads, -1)
        q = torch.cat([q_nope, q_rope], -1).transpose(1, 2)  # (B, H, T, nope + rope)
        k = torch.cat([k_nope, k_rope], -1).transpose(1, 2)  # (B, H, S, nope + rope)
        # fused kernels need values as wide as keys: pad with zeros here, cut the result below
        padded = F.pad(v, (0, max(0, q.shape[-1] - v.shape[-1]))).transpose(1, 2)
        heads = attend(q, k, padded, places, self.mask, scale=self.scale)
        return heads.transpose(1, 2)[..., : v.shape[-1]]

    def attend_absorbed(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, places: Places) -> Tensor:
        """The same result by multi-query attention to the latents: -> (B, T, H, v_head_dim)."""
        up_proj = self.kv_b_proj.weight.unflatten(0, (self.n_heads, -1))
        w_uk, w_uv = up_proj.split(self.expanded_split, 1)  # (H, nope, rank), (H, v_head_dim, rank)
        q_latent = torch.einsum("bthd,hdr->bthr", q_nope, w_uk)
        # all heads share one key, so the heads of a token are treated as more queries at the same position
        q = torch.cat([q_latent, q_rope], -1).flatten(1, 2)[:, None]  # (B, 1, T H, rank + rope)
        repeated = Places(places.q.repeat_interleave(self.n_heads, -1), places.k)
        k = torch.cat([latent, k_rope], -1)[:, None]  # (B, 1, S, rank + rope)
        mixed = attend(q, k, k, repeated, self.mask, scale=self.scale)[:, 0, :, : latent.shape[-1]]
        return torch.einsum("bthr,hdr->bthd", mixed.unflatten(1, (-1, self.n_heads)), w_uv)

    def make_cache(self, batch_size: int, length: int) -> dict[str, Tensor]:
        """Slots for `length` tokens, or the mask's reach if shorter: kv_lora_rank + qk_rope_head_dim values each."""
        n_slots, (rank, rope_dim) = min(length, self.mask.reach), self.kv_split
        return empty_slots(batch_size, n_slots, self.kv_b_proj.weight, latent=(rank,), k_rope=(rope_dim,))

    def flops(self, context: int) -> float:
        """FLOPs per token of the two attention products in `attend_expanded`, without the projections."""
        widths = sum(self.q_split) + self.expanded_split[1]  # of a key and of a value
        return 2 * self.n_heads * widths * mean_keys(self.mask, context)
