"""What a masked diffusion model does in place of predicting the next token: it fills in tokens that are hidden.

    loss      hide random tokens of a text; cross-entropy of the hidden ones, weighted: a bound on -log p(text)
    writing   prompt, then hidden tokens to the end of the text; in each step some of them become text

Nothing else differs from a decoder but the mask: a token sees the later ones, too. So there is no cache to keep: each
step computes the whole text anew.

Large Language Diffusion Models (LLaDA), arXiv 2502.09992; Simple and Effective Masked Diffusion Language Models (MDLM),
arXiv 2406.07524. Blog: Diffusion.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from llm.config import ModelConfig
from llm.models.transformer import Transformer
from llm.modules.diffusion.hiding import MaskableEmbedding, hide
from llm.modules.diffusion.unmasking import Unmasking, fill_in
from llm.modules.kernels.cross_entropy import linear_cross_entropy


class Denoiser(Transformer):
    """A Transformer with the objective of masked diffusion; its blocks must not hide later tokens.

    `unmasking` says how `generate` writes, and may be replaced at any time. Where the vocabulary has an entry for a
    hidden token, the config names it in `mask_token`. Otherwise the embedding gets one more vector.
    """

    causal: ClassVar[bool] = False

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.unmasking = Unmasking()
        named = getattr(config, "mask_token", None)
        self.mask_token = config.vocab_size if named is None else named
        if named is None:
            self.tok_embed = MaskableEmbedding(self.tok_embed, self.embedding_std)

    def group_size(self, n_tokens: int) -> int:
        """How many tokens the bound takes at once: here the whole text."""
        return n_tokens

    def denoise(self, noisy: Tensor, clean: Tensor) -> Tensor:
        """Texts with hidden tokens (B, T), and whole, -> what predicts each token, (B, T, D)."""
        return self.aligned(self.hidden(noisy))

    def aligned(self, x: Tensor) -> Tensor:
        """(B, T, D), so that each vector predicts the token in its own place."""
        return x

    def noise(self, n_windows: int, length: int, generator: torch.Generator) -> tuple[Tensor]:
        """What is hidden, as weights (n_windows, length) of llm/modules/diffusion/hiding.py."""
        return (hide(torch.empty(n_windows, length), self.group_size(length), generator),)

    def loss(self, tokens: Tensor, weight: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Windows (B, T + 1), whose last T tokens are the text -> the loss and its parts. `ce` estimates a bound on the
        nats for each token. `weight` (B, T) is `noise`; where it is not given, torch's global generator decides."""
        clean = tokens[:, 1:]
        if weight is None:
            weight = hide(clean, self.group_size(clean.shape[1]))
        x = self.norm(self.denoise(clean.masked_fill(weight > 0, self.mask_token), clean))
        ce = linear_cross_entropy(x.flatten(0, 1), self.head_weight(), clean.flatten(), weight.flatten())
        return self.with_aux(ce, self.pop_losses())

    @torch.inference_mode()
    def generate(
        self, tokens: Tensor, max_new_tokens: int, sampler: Callable[[Tensor], Tensor], padding: Tensor | int = 0
    ) -> Iterator[Tensor]:
        """As `Transformer.generate`, but it ends at max_seq_len, and goes block by block, (B, n): the text has its full
        length from the start, and the later blocks are hidden while one is written. `sampler` turns logits (B, n, V)
        into tokens (B, n)."""
        begin, size = tokens.shape[1], self.unmasking.block_size
        end = min(begin + max_new_tokens, self.config.max_seq_len)
        text = F.pad(tokens, (0, end - begin), value=self.mask_token)
        for first in range(begin, end, size):
            part = slice(first, min(first + size, end))
            predict = partial(self.predict, text, part, begin, padding)
            block = text[:, part]
            hidden, number = torch.ones_like(block, dtype=torch.bool), (first - begin) // size
            text[:, part] = fill_in(block, hidden, predict, sampler, self.unmasking, number)
            yield text[:, part].clone()

    def predict(self, text: Tensor, part: slice, begin: int, padding: Tensor | int, block: Tensor) -> Tensor:
        """Logits (B, n, V) of a part of the text, with `block` (B, n) in its place. The prompt ends before `begin`."""
        text[:, part] = block
        logits = self.logits_of(text, part, padding)
        if self.unmasking.guidance:
            unprompted = text.clone()
            unprompted[:, :begin] = self.mask_token
            logits = logits + self.unmasking.guidance * (logits - self.logits_of(unprompted, part, padding))
        return self.never_hidden(logits)

    def logits_of(self, text: Tensor, part: slice, padding: Tensor | int) -> Tensor:
        """(B, T) -> logits (B, n, V) of the tokens in `part`. The cache only says where each text begins."""
        x = self.aligned(self.hidden(text, self.make_cache(len(text), text.shape[1], padding)))
        return self.unembed(x[:, part])

    def choices(self, x: Tensor) -> Tensor:
        """(B, n, D) -> logits (B, n, V), in which a hidden token is never the choice."""
        return self.never_hidden(self.unembed(x))

    def never_hidden(self, logits: Tensor) -> Tensor:
        """Changes logits (B, n, V) so that the entry of a hidden token is not chosen."""
        logits[..., self.mask_token : self.mask_token + 1] = -torch.inf  # nothing where it is no entry
        return logits

    def passes_per_token(self, context: int) -> dict[str, float]:
        """A step computes the whole text, and the head for one block."""
        size = min(self.unmasking.block_size, context)
        steps = min(self.unmasking.steps, size)
        guided = 2 if self.unmasking.guidance else 1
        return {"training_blocks": 1, "writing_blocks": guided * steps * context / size, "writing_head": guided * steps}
