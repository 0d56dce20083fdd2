"""The base class of every model: embed the tokens, run the blocks, compute the logits.

    x = embed(tokens)        x = block_l(x) for l = 1..L        logits = norm(x) W_head

A model subclasses `Transformer` and overrides the step that its paper changes. Its hyperparameters are in its `Config`,
a frozen dataclass. Blog: Overview.
"""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm.config import ModelConfig
from llm.modules.cache import Cache, slots_for
from llm.modules.initialization import embedding_std, initialize
from llm.modules.kernels.cross_entropy import linear_cross_entropy
from llm.modules.norms import RMSNorm


class Transformer(nn.Module):
    """A decoder-only language model. A subclass must define `make_block`.

    Tokens are int64 (B, T); logits (B, T, vocab_size). With a cache, each call continues the text of the previous call.

    A submodule may define `pop_loss() -> Tensor | None`, which `loss` calls, `after_step()`, called after an optimiser
    step, and `metrics() -> dict`, called for the log.
    """

    Config = ModelConfig
    causal: ClassVar[bool] = True
    """Whether a token sees no later ones and the loss is that of the next token. False: see llm/models/denoiser.py."""
    training_only: ClassVar[tuple[str, ...]] = ()
    """Attributes that only training uses. The counts of active parameters and FLOPs leave them out."""
    stage_fields: ClassVar[tuple[str, ...]] = ()
    """Settings that are no sizes of weights and differ between stages of training: `--resume PATH` may change them."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.tok_embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(self.make_block(layer) for layer in range(config.n_layers))
        self.norm = self.make_norm()
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        initialize(self, config.initialization, config.n_layers, self.embedding_std)

    @property
    def embedding_std(self) -> float:
        """Standard deviation of the token embedding at initialisation."""
        c = self.config
        return embedding_std(c.initialization, c.d_model, c.tie_embeddings)

    def make_block(self, layer: int) -> nn.Module:
        """The block at depth `layer`. Its `mixer`, often attention, takes (x, positions, cache); its `ffn` takes x."""
        raise NotImplementedError(f"{type(self).__name__} must say what its blocks are made of: define make_block")

    def make_norm(self) -> nn.Module:
        """A new norm layer, for a block or for the final norm before the head."""
        return RMSNorm(self.config.d_model, self.config.norm_eps)

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Tokens (B, T) at positions (T,) or (B, T) -> (B, T, D)."""
        return self.tok_embed(tokens)

    def run_blocks(self, x: Tensor, positions: Tensor, layers: list[dict | None], tokens: Tensor) -> Tensor:
        """Run the residual stream x (B, T, D) through all blocks. `layers` holds the cache of each block, or None. A
        model whose blocks need more inputs than these overrides this."""
        for block, layer_cache in zip(self.blocks, layers, strict=True):
            x = block(x, positions, layer_cache)
        return x

    def hidden(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """(B, T) -> (B, T, D): the residual stream after the last block, before the final norm."""
        n_tokens = tokens.shape[1]
        if cache is None:
            positions, layers = torch.arange(n_tokens, device=tokens.device), [None] * len(self.blocks)
        else:
            positions, layers = cache.positions(n_tokens), cache.layers
        x = self.run_blocks(self.embed(tokens, positions), positions, layers, tokens)
        if cache is not None:
            cache.seen += n_tokens
        return x

    def unembed(self, x: Tensor) -> Tensor:
        """(B, T, D) -> logits (B, T, V)."""
        return F.linear(self.norm(x), self.head_weight())

    @property
    def has_plain_head(self) -> bool:
        """Whether `unembed` is one product, so that the loss need not hold all logits at once."""
        return type(self).unembed is Transformer.unembed

    def head_weight(self) -> Tensor:
        """The output head, (V, D): the token embedding with tied embeddings, else a separate matrix."""
        return self.tok_embed.weight if self.config.tie_embeddings else self.lm_head.weight

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        return self.unembed(self.hidden(tokens, cache))

    def noise(self, n_windows: int, length: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """What is random in the loss of windows (n_windows, length + 1): more inputs of `loss`, a row for each window.
        Here there are none. Modules that draw random numbers themselves do so anew for each micro-batch."""
        return ()

    def loss(self, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Windows (B, T + 1) -> the mean loss to minimise and its parts: `ce`, the cross-entropy in nats per token, and
        `aux`, the sum of the auxiliary losses (0 if there are none)."""
        x, targets = self.hidden(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
        if self.has_plain_head:
            ce = linear_cross_entropy(self.norm(x), self.head_weight(), targets)
        else:  # the model overrides `unembed`, as Gemma 2 does to cap its logits
            ce = F.cross_entropy(self.unembed(x).float(), targets)
        return self.with_aux(ce, self.pop_losses())

    def with_aux(self, ce: Tensor, aux: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The total loss, `ce` plus the sum of `aux`, and its detached parts."""
        if not aux:  # torch.compile would turn `ce + 0` into the detached ce, which has no gradient
            return ce, {"ce": ce.detach(), "aux": ce.new_zeros(())}
        total = sum(aux)
        return ce + total, {"ce": ce.detach(), "aux": total.detach()}

    def pop_losses(self) -> list[Tensor]:
        """Return the auxiliary losses of the last forward pass and clear them."""
        losses = [module.pop_loss() for module in self.offering("pop_loss")]
        return [loss for loss in losses if loss is not None]

    def after_step(self) -> None:
        """Called after each optimiser step on every rank: run the updates that use no gradient."""
        for module in self.offering("after_step"):
            module.after_step()

    def metrics(self) -> dict[str, Any]:
        """Metrics of the last step. `name` maps to a list with one value for each module. If that value is itself a
        list, the list of module i is stored under `name/i` instead."""
        found: dict[str, list] = {}
        for module in self.offering("metrics"):
            for name, value in module.metrics().items():
                found.setdefault(name, []).append(value)
        lists = {name for name, values in found.items() if isinstance(values[0], list)}
        numbered = {f"{name}/{i}": value for name in lists for i, value in enumerate(found[name])}
        return numbered | {name: values for name, values in found.items() if name not in lists}

    def offering(self, method: str) -> list[nn.Module]:
        """The submodules that have this method, from the first layer to the last."""
        return [module for module in self.modules() if module is not self and hasattr(module, method)]

    def passes_per_token(self, context: int) -> dict[str, float]:
        """How often one token goes through the blocks and through the head: `training`, in a forward pass of training
        for each token of text; `writing`, for each token written into a text of `context` tokens."""
        return {"training_blocks": 1, "writing_blocks": 1, "writing_head": 1}

    def make_cache(self, batch_size: int, length: int, padding: Tensor | int = 0) -> Cache:
        """An empty cache for `length` tokens. `padding` is the number of padding tokens on the left of each prompt."""
        device = self.tok_embed.weight.device
        seen = torch.zeros(batch_size, dtype=torch.int64, device=device) - padding
        mixers = (getattr(block, "mixer", None) for block in self.blocks)  # an FFNBlock has none
        return Cache(seen, [{} if mixer is None else mixer.make_cache(batch_size, length) for mixer in mixers])

    @torch.inference_mode()
    def generate(
        self, tokens: Tensor, max_new_tokens: int, sampler: Callable[[Tensor], Tensor], padding: Tensor | int = 0
    ) -> Iterator[Tensor]:
        """Continue prompts (B, T), left-padded by `padding` (B,) tokens; yields the next token of each prompt,
        (B,), or its next n tokens, (B, n), where a model writes several at once.

        `sampler` turns logits (B, V) into tokens (B,). Ends after `max_new_tokens`, or with the token that follows a
        full context: the model reads at most max_seq_len tokens, and the last one predicts one more.
        """
        length, limit = tokens.shape[1], self.config.max_seq_len
        n_slots = slots_for(length, limit)
        cache = self.make_cache(len(tokens), n_slots, padding)
        for n in range(length, min(length + max_new_tokens, limit + 1)):
            if n > n_slots:
                n_slots = slots_for(n, limit)
                cache = self.make_cache(len(tokens), n_slots).copy_from(cache)
            step = self.next_logits if n == length else self.decode
            tokens = sampler(step(tokens, cache))[:, None]
            yield tokens[:, 0]

    def next_logits(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Tokens (B, T) that follow those in the cache -> logits of the next token, (B, V)."""
        return self.unembed(self.hidden(tokens, cache)[:, -1])

    def decode(self, tokens: Tensor, cache: Cache) -> Tensor:
        """`next_logits` for one token of each text, (B, 1). Generation repeats this step, mostly with the same shapes,
        so `compile_decoding` in llm/generate/compile.py compiles it."""
        return self.next_logits(tokens, cache)
