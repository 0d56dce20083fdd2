"""Block diffusion: one block after the other as in a decoder, the tokens of a block by diffusion.

    -log p(x) = sum_b -log p(block_b | blocks before)               each term bounded as in masked diffusion

In training all blocks are denoised in one pass over two copies of the text. A hidden or visible token of the noisy copy
sees its own noisy block and the earlier blocks of the clean copy; the clean copy sees its own and earlier blocks. So
each token goes through the blocks twice. In writing, finished blocks are kept in the cache, which masked diffusion
cannot do. Blocks of one token are the autoregressive objective, and one block for the whole text is masked diffusion.

Block Diffusion (BD3-LM), arXiv 2503.09573. Blog: Diffusion.
Gallery: docs/gallery/index.html#block_diffusion
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from llm.config import check_divides, check_positive
from llm.models.baseline import Baseline
from llm.models.masked_diffusion import MaskedDiffusion
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.cache import Cache, slots_for
from llm.modules.diffusion.unmasking import fill_in
from llm.modules.masks import NOISY, BlockCausal


class BlockDiffusion(MaskedDiffusion):
    @dataclass(frozen=True)
    class Config(Baseline.Config):
        """The baseline's sizes and blocks of four tokens."""

        block_size: int = 4
        """Tokens that are written together; must divide max_seq_len."""

        def __post_init__(self):
            super().__post_init__()
            check_positive(self, "block_size")
            check_divides(self, "block_size", "max_seq_len")

    def make_mixer(self, layer: int) -> nn.Module:
        c = self.config
        return MultiHeadAttention(d_model=c.d_model, n_heads=c.n_heads, mask=BlockCausal(c.block_size))

    def group_size(self, n_tokens: int) -> int:
        return self.config.block_size

    def denoise(self, noisy: Tensor, clean: Tensor) -> Tensor:
        """Both copies in one pass. NOISY tells them apart; rows of positions, since they are not 0, 1, 2, .."""
        p = torch.arange(noisy.shape[1], device=noisy.device)
        x = torch.cat([self.embed(noisy, p), self.embed(clean, p)], 1)  # (B, 2 T, D)
        positions = torch.cat([p + NOISY, p])[None]
        x = self.run_blocks(x, positions, [None] * len(self.blocks), torch.cat([noisy, clean], 1))
        return x[:, : noisy.shape[1]]

    @torch.inference_mode()
    def generate(
        self, tokens: Tensor, max_new_tokens: int, sampler: Callable[[Tensor], Tensor], padding: Tensor | int = 0
    ) -> Iterator[Tensor]:
        """As `Transformer.generate`, but yields (B, n), the tokens that a block adds to every text. `sampler` turns
        logits (B, n, V) into tokens (B, n). A block that the prompt ends in is completed first."""
        size, limit = self.config.block_size, self.config.max_seq_len
        n_new = min(tokens.shape[1] + max_new_tokens, limit) - tokens.shape[1]
        n_prompt = torch.as_tensor(tokens.shape[1] - padding, device=tokens.device).expand(len(tokens))
        text, begin = self.align(tokens, n_prompt, n_new)
        n_slots, written = slots_for(begin + size, limit), 0
        cache = self.make_cache(len(text), n_slots, begin - n_prompt // size * size)
        if begin:
            self.hidden(text[:, :begin], cache)
        for first in range(begin, text.shape[1], size):
            if first + size > n_slots:
                n_slots = slots_for(first + size, limit)
                cache = self.make_cache(len(text), n_slots).copy_from(cache)
            block = text[:, first : first + size]
            block.copy_(fill_in(block, block == self.mask_token, partial(self.guess, cache), sampler, self.unmasking))
            self.hidden(block, cache)  # now that it is final, its keys and values stay
            new = torch.arange(written, min(first + size - begin - int((n_prompt % size).max()), n_new))
            yield text.gather(1, begin + (n_prompt % size)[:, None] + new.to(text.device))
            written += len(new)

    def align(self, tokens: Tensor, n_prompt: Tensor, n_new: int) -> tuple[Tensor, int]:
        """Left-padded prompts (B, T) of `n_prompt` (B,) tokens -> the texts to write, and the column where each one's
        first unfinished block begins: padding, prompt, and hidden tokens for at least `n_new` more, in whole blocks."""
        size, length = self.config.block_size, tokens.shape[1]
        begin = int((n_prompt // size * size).max())
        width = begin + -(-(int((n_prompt % size).max()) + n_new) // size) * size
        shift = begin + n_prompt % size - length  # a prompt moves so far to the right
        source = torch.arange(width, device=tokens.device) - shift[:, None]
        prompt = tokens.gather(1, source.clamp(0, length - 1))
        return torch.where(source < length, prompt, self.mask_token), begin

    def guess(self, cache: Cache, block: Tensor) -> Tensor:
        """Logits (B, n, V) of a block that is not final yet: the cache is read and stays as it is."""
        logits = self.choices(self.hidden(block, cache))
        cache.forget(block.shape[1])
        return logits

    def passes_per_token(self, context: int) -> dict[str, float]:
        """In training both copies go through the blocks. A step computes one block, and so does keeping it."""
        steps = min(self.unmasking.steps, self.config.block_size)
        return {"training_blocks": 2, "writing_blocks": steps + 1, "writing_head": steps}
