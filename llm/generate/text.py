"""Write text: encode the prompt as the beginning of a document, generate tokens, decode them as they come."""

import re
from collections.abc import Callable, Collection

from tokenizers import Tokenizer
from torch import Tensor

from llm.data.stories import END_OF_TEXT
from llm.generate.sampling import generate_tokens, greedy
from llm.models.transformer import Transformer


def write(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: list[str],
    max_new_tokens: int,
    sampler: Callable[[Tensor], Tensor] = greedy,
    on_text: Callable[[int, str], None] = lambda row, text: None,
    on_full: Callable[[], None] = lambda: None,
    stop: Collection[int] = (),
) -> list[str]:
    """The prompts, each with its continuation. A prompt is given to the model as the beginning of a document.

    `on_text(row, text)` is called with each new piece of text as soon as no later token can change it; together the
    pieces are the continuation. `on_full()` is called at the end if max_seq_len cut a text short. `stop` are the tokens
    that end a text; without any, `<|endoftext|>` does if the tokenizer has it.
    """
    beginnings = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    texts = write_after(model, tokenizer, beginnings, max_new_tokens, sampler, on_text, on_full, stop)
    return [prompt + text for prompt, text in zip(prompts, texts, strict=True)]


def write_after(
    model: Transformer,
    tokenizer: Tokenizer,
    beginnings: list[list[int]],
    max_new_tokens: int,
    sampler: Callable[[Tensor], Tensor] = greedy,
    on_text: Callable[[int, str], None] = lambda row, text: None,
    on_full: Callable[[], None] = lambda: None,
    stop: Collection[int] = (),
) -> list[str]:
    """The continuations of texts that are given as tokens; otherwise as `write`."""
    stop = set(stop or end_of_text(tokenizer))
    streams = [TextStream(tokenizer, beginning) for beginning in beginnings]
    length = max(map(len, beginnings))
    for step in generate_tokens(model, beginnings, max_new_tokens, sampler, stop):
        for row, token in enumerate(step):
            if token is not None and token not in stop and (piece := streams[row].add(token)):
                on_text(row, piece)
        length += 1
    for row, stream in enumerate(streams):
        if piece := stream.end():
            on_text(row, piece)
    if length > model.config.max_seq_len and any(token is not None and token not in stop for token in step):
        on_full()
    return [stream.written for stream in streams]


class TextStream:
    """Decode the continuation of a prompt token by token. The pieces that `add` and `end` return are, together,
    `decode(prompt + continuation)` without what it has in common with the beginning of `decode(prompt)`.

    Text is held back while later tokens can change it:

    - A character may take several tokens. Until its last one, it decodes to U+FFFD.
    - Byte-fallback tokenizers (Llama 2, Mistral, Gemma) write a character outside their vocabulary as tokens <0x00> to
      <0xFF>. Neighbouring ones are decoded together. Where these are not valid UTF-8, each becomes U+FFFD, even those
      of a complete character. So nothing of such a sequence is written before it ends.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int]):
        self.tokenizer = tokenizer
        self.tokens, self.prompt, self.written = list(prompt), tokenizer.decode(prompt), ""
        self.special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}

    def add(self, token: int) -> str:
        """The text that is certain with this token; often empty."""
        self.tokens.append(token)
        return "" if self.is_unfinished(token) else self.advance(self.tokenizer.decode(self.tokens).rstrip(UNKNOWN))

    def end(self) -> str:
        """The text that was held back, at the end of the continuation."""
        return self.advance(self.tokenizer.decode(self.tokens))

    def is_unfinished(self, token: int) -> bool:
        """Whether the token is one byte of several, or not part of the text and so no end of the bytes before it."""
        name = self.tokenizer.id_to_token(token)
        return name is None or token in self.special or BYTE_TOKEN.fullmatch(name) is not None

    def advance(self, text: str) -> str:
        """What the certain beginning `text` of everything adds to what was written."""
        differs = (i for i, (a, b) in enumerate(zip(text, self.prompt, strict=False)) if a != b)
        start = next(differs, min(len(text), len(self.prompt)))
        piece = text[start + len(self.written) :]
        self.written += piece
        return piece


UNKNOWN = "\N{REPLACEMENT CHARACTER}"
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The tokens of a document that begins with `prompt`.

    With a tokenizer of ours, `<|endoftext|>` comes before it, as in training. A tokenizer with a rule of its own, as in
    hub folders, follows that rule. Raises ValueError where there is no token at all.
    """
    ids = tokenizer.encode(prompt).ids
    if tokenizer.post_processor is None:
        ids = end_of_text(tokenizer) + ids
    if not ids:
        raise ValueError("the prompt is empty, and this tokenizer puts nothing before a text: give a --prompt")
    return ids


def end_of_text(tokenizer: Tokenizer) -> list[int]:
    """The id of `<|endoftext|>`, or nothing where a tokenizer has no such token."""
    token = tokenizer.token_to_id(END_OF_TEXT)
    return [] if token is None else [token]
