"""A conversation with a published model.

Each turn writes all messages so far with the model's chat template, and the model continues that text with its answer.
All of it is read anew each time, since a template may write an old message in another way than a new one: Qwen3's
leaves out what the model thought before an earlier answer.
"""

import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TextIO

from tokenizers import Tokenizer
from torch import Tensor

from llm.generate.text import write_after
from llm.hub.chat_template import ChatTemplate
from llm.models.transformer import Transformer


def read_messages(stream: TextIO | None) -> Iterator[str]:
    """The user's messages: one a line, at a terminal after `> ` on the standard error. Empty lines are passed over.

    Ends with the stream. Raises ValueError where it was closed from the start, or is not text.
    """
    if stream is None or stream.closed:
        raise ValueError("the standard input is closed, and --chat reads messages there: pipe them in, or use --prompt")
    while True:
        if stream.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = stream.readline()
            line.encode()
        except UnicodeError:  # the stream is strict, or it has marked bytes with surrogates
            raise ValueError(
                f"a message is not valid {stream.encoding}: set the terminal to UTF-8, or PYTHONIOENCODING=utf-8"
            ) from None
        except OSError:  # the terminal is gone
            return
        if not line:
            return
        if line.strip():
            yield line.strip()


def converse(
    model: Transformer,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    lines: Iterable[str],
    max_new_tokens: int,
    sampler: Callable[[Tensor], Tensor],
    stop: Collection[int],
    system: str | None = None,
) -> list[dict[str, str]]:
    """Answer each message of the user in turn, printing the answer as it comes; returns the whole conversation.

    `system` is the message before them all. Ends with the last line, or where the conversation fills the context, which
    is said on the standard error. Raises PretrainedError where the template refuses the messages.
    """
    messages = [] if system is None else [{"role": "system", "content": system}]
    limit, full = model.config.max_seq_len, []
    for line in lines:
        messages.append({"role": "user", "content": line})
        beginning = tokenizer.encode(template.render(messages), add_special_tokens=False).ids
        if len(beginning) > limit:
            explain_end(f"has {len(beginning)} tokens", limit)
            break
        (answer,) = write_after(
            model, tokenizer, [beginning], max_new_tokens, sampler, stream, lambda: full.append(True), stop
        )
        print("\n", flush=True)
        messages.append({"role": "assistant", "content": answer})
        if full:
            explain_end("is full", limit)
            break
    return messages


def stream(row: int, text: str) -> None:
    """Print a piece of text at once."""
    print(text, end="", flush=True)


def explain_end(why: str, limit: int) -> None:
    """Say why a conversation ends before its last message."""
    print(
        f"(the conversation {why}, and this model reads max_seq_len = {limit}: begin another, or set --max-seq-len)",
        file=sys.stderr,
    )
