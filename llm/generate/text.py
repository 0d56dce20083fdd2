"""Write text: encode the prompt as the beginning of a document, generate tokens, decode them as they come."""

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

    `on_text(row, text)` is called with each new piece of text as soon as its characters are complete, and `on_full()`
    at the end if max_seq_len cut a text short. `stop` are the tokens that end a text; without any, `<|endoftext|>` does
    if the tokenizer has it.
    """
    stop = set(stop or end_of_text(tokenizer))
    beginnings = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    tokens = [list(beginning) for beginning in beginnings]
    known = [tokenizer.decode(beginning) for beginning in beginnings]  # some decoders change the first character
    shown = list(known)
    length = max(map(len, beginnings))
    for step in generate_tokens(model, beginnings, max_new_tokens, sampler, stop):
        for row, token in enumerate(step):
            if token is None or token in stop:
                continue
            tokens[row].append(token)
            text = tokenizer.decode(tokens[row])
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half of a character that takes several bytes
                on_text(row, text.removeprefix(shown[row]))
                shown[row] = text
        length += 1
    if length == model.config.max_seq_len and any(token is not None and token not in stop for token in step):
        on_full()
    texts = zip(prompts, tokens, known, strict=True)
    return [prompt + tokenizer.decode(ids).removeprefix(beginning) for prompt, ids, beginning in texts]


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
