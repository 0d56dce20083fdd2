"""DeepSeek Sparse Attention (DSA): a small indexer scores all tokens so far, and latent attention reads the best k.

    I_ts = sum_j w_tj relu(q_tj . k_s) / sqrt(heads x width)     few narrow heads j; one key k_s a token; w_t = x_t W
    token t attends to the k tokens s <= t with the largest I_ts

The choice has no gradient, so the indexer has a loss of its own and reads its input without a gradient to the model:

    loss = mean over t of KL(p_t || softmax(I_t))      p_t: the probabilities of the main attention, mean over its heads

p_t and the softmax are taken over the chosen tokens. In the warm-up before that, attention is dense, the KL is over all
tokens up to t, and every weight but the indexers' is frozen. The published code also rotates q and k by a Hadamard
matrix and scores in fp8; neither changes the idea. DeepSeek-V3.2, arXiv 2512.02556, section 2. Blog: Attention, learned
sparse attention.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from llm.modules.attention.latent import LatentAttention
from llm.modules.cache import Places, store
from llm.modules.kernels.precision import without_autocast
from llm.modules.masks import Window, causal, mean_keys, visibility
from llm.modules.norms import LayerNorm
from llm.modules.recurrent.state import widen
from llm.modules.sparse.chosen import QUERIES, attend_to_chosen, look_up


class Indexer(nn.Module):
    """Scores (B, T, S) of S keys for T queries. `rope` rotates the heads (B, T, H, head_dim)."""

    def __init__(self, *, d_model: int, q_lora_rank: int, n_heads: int, head_dim: int, rope: nn.Module):
        super().__init__()
        self.n_heads, self.head_dim, self.rope = n_heads, head_dim, rope
        self.q_proj = nn.Linear(q_lora_rank, n_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(d_model, head_dim, bias=False)
        self.k_norm = LayerNorm(head_dim, 1e-6)
        self.weights_proj = nn.Linear(d_model, n_heads, bias=False)

    def keys(self, x: Tensor, positions: Tensor) -> Tensor:
        """x (B, T, d_model) -> (B, T, head_dim), as they are cached."""
        return self.rope(self.k_norm(self.k_proj(x))[:, :, None], positions)[:, :, 0]

    def forward(self, x: Tensor, q_latent: Tensor, k: Tensor, positions: Tensor) -> Tensor:
        """x (B, T, d_model), its query latents (B, T, q_lora_rank) and keys (B, S, head_dim) -> I (B, T, S), in fp32 at
        least: in bf16 other tokens would be the best."""
        q = self.rope(self.q_proj(q_latent).unflatten(-1, (self.n_heads, -1)), positions)  # (B, T, H, head_dim)
        weights = widen(self.weights_proj(x)) * (self.n_heads * self.head_dim) ** -0.5  # (B, T, H)
        with without_autocast(x):
            similar = (widen(q).flatten(1, 2) @ widen(k).mT).relu_().unflatten(1, q.shape[1:3])  # (B, T, H, S)
            return (weights[:, :, None] @ similar)[:, :, 0]


class SparseLatentAttention(LatentAttention):
    """Latent attention to the `index_top_k` tokens that `indexer` scores highest.

    index_loss_coef   weight of the indexer's loss in training
    dense             the warm-up: all tokens so far, for attention and for the loss; the model freezes the rest

    `options` are those of LatentAttention, except mask; there must be a q_lora_rank, whose latent the indexer reads.
    """

    def __init__(self, *, indexer: Indexer, index_top_k: int, index_loss_coef: float, dense: bool = False, **options):
        super().__init__(**options)
        self.indexer, self.index_top_k, self.dense = indexer, index_top_k, dense
        self.index_loss_coef = index_loss_coef
        self.index_loss: Tensor | None = None  # of the last forward pass in training, until it is taken

    def forward(self, x: Tensor, positions: Tensor, cache: dict | None = None) -> Tensor:
        q_latent = self.q_a_norm(self.q_a_proj(x))
        q_nope, q_rope = self.heads_of(q_latent, positions)
        latent, k_rope = self.compress(x, positions)
        index_k = self.indexer.keys(x.detach(), positions)
        latent, k_rope, index_k, places = store(cache, positions, latent=latent, k_rope=k_rope, index_k=index_k)
        n_keys = index_k.shape[1]
        n_chosen = n_keys if self.dense else min(self.index_top_k, n_keys)
        best, index = self.choose(x.detach(), q_latent.detach(), index_k, places, n_chosen)
        q, k, w_uv = self.absorb(q_nope, q_rope, latent, k_rope)
        if self.training:
            target = self.probabilities(q, k, index, best > -torch.inf)
            self.index_loss = self.index_loss_coef * divergence(target, best)
        if cache is None and n_chosen == n_keys:  # nothing is left out
            heads = self.attend_expanded(q_nope, q_rope, latent, k_rope, places)
        else:
            found = (best > -torch.inf)[:, None]
            mixed = attend_to_chosen(q, k[:, :, None], k[:, :, None], index[:, None], found, self.scale)
            heads = torch.einsum("bhtr,hdr->bthd", mixed[..., : latent.shape[-1]], w_uv)
        return self.o_proj(heads.flatten(2))

    def heads_of(self, q_latent: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """`queries` from their latents (B, T, q_lora_rank), which the indexer reads, too."""
        q_nope, q_rope = self.q_b_proj(q_latent).unflatten(-1, (self.n_heads, -1)).split(self.q_split, -1)
        return q_nope, q_rope if self.rope is None else self.rope(q_rope, positions)

    def choose(self, x: Tensor, q_latent: Tensor, k: Tensor, places: Places, n: int) -> tuple[Tensor, Tensor]:
        """The `n` largest scores of each token and the keys that have them, both (B, T, n); -inf for what is hidden.
        QUERIES tokens are scored at a time, and again in the backward pass, so that T x S scores are never held; of one
        text, the keys after them are not scored at all."""

        def part(x: Tensor, q_latent: Tensor, positions: Tensor, end: int) -> tuple[Tensor, Tensor]:
            shown = visibility(self.mask, positions, places.k[..., :end])  # (T, S) or (B, 1, T, S)
            scores = self.indexer(x, q_latent, k[:, :end], positions)
            scores = scores.masked_fill(~(shown if shown.dim() == 2 else shown[:, 0]), -torch.inf)
            best, index = scores.topk(min(n, end), -1)
            return F.pad(best, (0, n - best.shape[-1]), value=-torch.inf), F.pad(index, (0, n - index.shape[-1]))

        if x.shape[1] <= QUERIES:
            return part(x, q_latent, places.q, k.shape[1])
        ends = [start + QUERIES if places.whole_text else k.shape[1] for start in range(0, x.shape[1], QUERIES)]
        inputs = zip(x.split(QUERIES, 1), q_latent.split(QUERIES, 1), places.q.split(QUERIES, -1), ends, strict=True)
        again = partial(checkpoint, part, use_reentrant=False, preserve_rng_state=False)
        parts = [(again if torch.is_grad_enabled() else part)(*each) for each in inputs]
        return tuple(torch.cat(both, 1) for both in zip(*parts, strict=True))

    def absorb(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> queries (B, H, T, rank + rope), keys (B, S, rank + rope) of one shared key head, W_uv (H, v, rank)."""
        w_uk, w_uv = self.kv_b_proj.weight.unflatten(0, (self.n_heads, -1)).split(self.expanded_split, 1)
        q = torch.cat([torch.einsum("bthd,hdr->bthr", q_nope, w_uk), q_rope], -1)
        return q.transpose(1, 2), torch.cat([latent, k_rope], -1), w_uv

    @torch.no_grad()
    def probabilities(self, q: Tensor, k: Tensor, index: Tensor, shown: Tensor) -> Tensor:
        """The main attention's probabilities of the tokens `index` (B, T, n), mean over the heads: (B, T, n)."""
        parts = []
        for q_i, i, s in zip(q.split(QUERIES, 2), index.split(QUERIES, 1), shown.split(QUERIES, 1), strict=True):
            if i.shape[-1] == k.shape[1]:  # all of them: scored first, then put into the order of the list
                scores = (q_i @ k[:, None].mT).gather(-1, i[:, None].expand(-1, q_i.shape[1], -1, -1))
            else:
                near = look_up(k[:, None], i[:, None])[:, 0]  # (B, T, n, rank + rope)
                scores = torch.einsum("bhtr,btnr->bhtn", q_i, near)
            p = widen(scores * self.scale).masked_fill(~s[:, None], -torch.inf)
            parts.append(p.softmax(-1).mean(1))
        return torch.cat(parts, 1)

    def pop_loss(self) -> Tensor | None:
        """The indexer's loss of the last forward pass in training, once."""
        loss, self.index_loss = self.index_loss, None  # copy.deepcopy fails on tensors with a graph
        return loss

    def after_step(self) -> None:
        """Called after an optimiser step: a forward pass that was recomputed has left its loss."""
        self.index_loss = None

    def make_cache(self, batch_size: int, length: int) -> dict[str, Tensor]:
        """Latent attention's slots, and the indexer's key for each token."""
        slots = super().make_cache(batch_size, length)
        index_k = slots["latent"].new_zeros(batch_size, slots["pos"].shape[1], self.indexer.head_dim)
        return slots | {"index_k": index_k}

    def flops(self, context: int) -> float:
        """FLOPs per token, without the projections: the indexer on all earlier tokens, attention to the chosen ones.
        Attention to all of them, in the warm-up or in a short text, is that to the expanded keys of LatentAttention."""
        indexer = 2 * self.indexer.n_heads * self.indexer.head_dim * mean_keys(causal, context)
        if self.dense or context <= self.index_top_k:
            return indexer + super().flops(context)
        (rank, rope_dim), chosen = self.kv_split, mean_keys(Window(self.index_top_k), context)  # as many as in a window
        return indexer + 2 * self.n_heads * (2 * rank + rope_dim) * chosen


def divergence(p: Tensor, scores: Tensor) -> Tensor:
    """KL(p || softmax(scores)) over the last axis, mean over the others. Scores of -inf belong to p = 0."""
    log_q = scores.masked_fill(scores == -torch.inf, torch.finfo(scores.dtype).min).log_softmax(-1)
    return (torch.special.xlogy(p, p) - p * log_q).sum(-1).mean()
