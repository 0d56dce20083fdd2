"""What a block diffusion model does in place of predicting the next token: it fills in one block after the other.

    loss      a noisy and a clean copy of the text in one pass; the noisy blocks see the clean ones before them
    writing   fill in the hidden tokens of a block, put the finished block into the cache, go on to the next

The attention of its blocks must have the mask `BlockCausal(config.block_size)`. A finished block never changes, so
writing keeps a cache.

Block Diffusion (BD3-LM), arXiv 2503.09573. Blog: Diffusion.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from llm.models.denoiser import Denoiser
from llm.modules.cache import Cache, slots_for
from llm.modules.diffusion.unmasking import fill_in
from llm.modules.masks import NOISY


class BlockDenoiser(Denoiser):
    """A Denoiser whose text is divided into blocks of `config.block_size` tokens."""

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
        """As `Transformer.generate`, but it ends at max_seq_len, and yields (B, n), the tokens that a block adds to
        every text. `sampler` turns logits (B, n, V) into tokens (B, n). A block that the prompt ends in is completed
        first."""
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
            block, predict = text[:, first : first + size], partial(self.predict, cache)
            number = (first - begin) // size
            block.copy_(fill_in(block, block == self.mask_token, predict, sampler, self.unmasking, number))
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

    def predict(self, cache: Cache, block: Tensor) -> Tensor:
        """Logits (B, n, V) of a block that is not final yet: the cache is read and stays as it is."""
        logits = self.choices(self.hidden(block, cache))
        cache.forget(block.shape[1])
        return logits

    def passes_per_token(self, context: int) -> dict[str, float]:
        """In training both copies go through the blocks. A step computes one block, and so does keeping it."""
        steps = min(self.unmasking.steps, self.config.block_size)
        return {"training_blocks": 2, "writing_blocks": steps + 1, "writing_head": steps}
