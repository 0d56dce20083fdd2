"""The skeleton under every model: embed the tokens, run the blocks, turn the result into logits.

    x = embed(tokens)        x = block_l(x) for l = 1..L        logits = norm(x) W_head

A model subclasses `Transformer` and overrides the step it changes: `make_block` always, the others where its idea needs
it. Blog: Overview.
"""

from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm.config import ModelConfig
from llm.modules.cache import Cache, room
from llm.modules.cross_entropy import linear_cross_entropy
from llm.modules.ffn.balance import balance_experts, count_choices, expert_metrics
from llm.modules.initialization import initialize
from llm.modules.norms import RMSNorm

Sampler = Callable[[Tensor], Tensor]


class Transformer(nn.Module):
    """A decoder-only language model without its blocks.

    Tokens are int64 (B, T); logits (B, T, vocab_size). With a cache, each call continues the text of the one before.
    """

    training_only: ClassVar[tuple[str, ...]] = ()
    """Parts that serve the loss in training and nothing else: they count as parameters, not as work for a token."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.tok_embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(self.make_block(layer) for layer in range(config.n_layers))
        self.norm = self.make_norm()
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        initialize(self, config.initialization, config.n_layers, config.embedding_std)

    def make_block(self, layer: int) -> nn.Module:
        """The block at depth `layer`: its `mixer` takes (x, positions, cache), its `ffn` takes x."""
        raise NotImplementedError(f"{type(self).__name__} must say what its blocks are made of: define make_block")

    def make_norm(self) -> nn.Module:
        """The norm before the head, and what `make_block` hands to its blocks."""
        return RMSNorm(self.config.d_model, self.config.norm_eps)

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Tokens (B, T) at positions (T,) or (B, T) -> (B, T, D)."""
        return self.tok_embed(tokens)

    def hidden(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """(B, T) -> (B, T, D): the residual stream after the last block, before the final norm."""
        if cache is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
            layers = self.share([None] * len(self.blocks))
        else:
            positions, layers = cache.positions(tokens.shape[1]), cache.layers
        x = self.embed(tokens, positions)
        for block, layer_cache in zip(self.blocks, layers, strict=True):
            x = block(x, positions, layer_cache)
        if cache is not None:
            cache.seen += tokens.shape[1]
        return x

    def unembed(self, x: Tensor) -> Tensor:
        """(B, T, D) -> logits (B, T, V)."""
        return F.linear(self.norm(x), self.head_weight())

    def head_weight(self) -> Tensor:
        """(V, D): the token embedding where it is tied, else a matrix of its own. Tied by use: there is one tensor."""
        return self.tok_embed.weight if self.config.tie_embeddings else self.lm_head.weight

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        return self.unembed(self.hidden(tokens, cache))

    def loss(self, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Windows (B, T + 1) -> the mean loss to minimise and its parts: `ce`, the cross-entropy in nats per token, and
        `aux`, what routers add in training to balance their experts (0 without experts)."""
        x, targets = self.hidden(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
        if type(self).unembed is Transformer.unembed:
            ce = linear_cross_entropy(self.norm(x), self.head_weight(), targets)
        else:  # logits that are not just a product are made as the model says
            ce = F.cross_entropy(self.unembed(x).float(), targets)
        parts = self.pop_aux_losses()
        if not parts:  # not `ce + 0`: compiled, that would be the detached ce, without a gradient
            return ce, {"ce": ce.detach(), "aux": ce.new_zeros(())}
        aux = sum(parts)
        return ce + aux, {"ce": ce.detach(), "aux": aux.detach()}

    def pop_aux_losses(self) -> list[Tensor]:
        """Right after a forward: take the `aux_loss` that routers left behind in training, and let them count what they
        chose. What checkpointing recomputes later stays uncounted; an `aux_loss` left behind would break deepcopy."""
        count_choices(self)
        left = []
        for module in self.modules():
            if (loss := getattr(module, "aux_loss", None)) is not None:
                left.append(loss)
                module.aux_loss = None
        return left

    def after_step(self) -> None:
        """Called after each optimiser step, on every rank: what a model changes outside the gradient."""
        balance_experts(self)
        self.pop_aux_losses()

    def metrics(self) -> dict[str, float | list[float]]:
        """What a model tells about its last step, after `after_step`; here how busy its experts were, if it has any."""
        return expert_metrics(self)

    def make_cache(self, batch_size: int, length: int, padding: Tensor | int = 0) -> Cache:
        """An empty cache for `length` tokens; `padding` says by how many tokens each prompt is padded on the left."""
        device = self.tok_embed.weight.device
        seen = torch.zeros(batch_size, dtype=torch.int64, device=device) - padding
        return Cache(seen, self.share([block.mixer.make_cache(batch_size, length) for block in self.blocks]))

    def share(self, layers: list) -> list:
        """One cache entry a layer; a model whose layers share keys hands the same entry to several."""
        return layers

    @torch.inference_mode()
    def generate(
        self, tokens: Tensor, max_new_tokens: int, sampler: Sampler, padding: Tensor | int = 0
    ) -> Iterator[Tensor]:
        """Continue prompts (B, T), left-padded by `padding` (B,) tokens; yields the next token of each, (B,).

        `sampler` turns logits (B, V) into tokens (B,). Ends after `max_new_tokens`, or when max_seq_len is full.
        """
        length, limit = tokens.shape[1], self.config.max_seq_len
        n_slots = room(length, limit)
        cache = self.make_cache(len(tokens), n_slots, padding)
        for n in range(length, min(length + max_new_tokens, limit)):
            if n > n_slots:
                n_slots = room(n, limit)
                cache = self.make_cache(len(tokens), n_slots).take_over(cache)
            step = self.next_logits if n == length else self.decode
            tokens = sampler(step(tokens, cache))[:, None]
            yield tokens[:, 0]

    def next_logits(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Tokens (B, T) that continue what is in the cache -> logits of the one after the last, (B, V)."""
        return self.unembed(self.hidden(tokens, cache)[:, -1])

    def decode(self, tokens: Tensor, cache: Cache) -> Tensor:
        """The same for one token of each text, (B, 1): the step that generation repeats. Shapes stay as they are for
        many steps, so it is worth compiling: `compile_decoding` in llm/generate.py."""
        return self.next_logits(tokens, cache)
