"""Write text with a trained model.

python -m llm.generate runs/baseline --prompt "Once upon a time"
python -m llm.generate path/to/checkpoint --prompt "The capital of France is"        # a folder as the hub has it
python -m llm.generate path/to/checkpoint --chat                                      # a model that was trained to chat
"""

import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro
from tokenizers import Tokenizer

from llm.console import console
from llm.generate.chat import converse, read_messages, stream
from llm.generate.compile import compile_decoding, wants_compiling
from llm.generate.load import load_run
from llm.generate.sampling import Sampler
from llm.generate.text import write
from llm.hub.chat_template import load_chat_template
from llm.hub.folder import stop_tokens
from llm.hub.gguf_tokenizer import gguf_stop_tokens
from llm.models.transformer import Transformer
from llm.modules.diffusion.unmasking import Unmasking
from llm.training.checkpoint import CheckpointError
from llm.training.device import find_device


@dataclass(frozen=True)
class Arguments:
    """Write stories with a trained model."""

    path: tyro.conf.Positional[Path]
    """Run directory, checkpoint, or folder of a published model as the hub has it."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """How the story begins; give the flag several times for several stories."""
    chat: bool = False
    """Have a conversation instead, written with the chat template of a published model. The messages come from the
    terminal, from a pipe, one a line, or from --prompt, each a turn."""
    system: str | None = None
    """With --chat: how the model is told to behave, before the first message."""
    template: str = "default"
    """With --chat: the name of a chat template, for a model that has several."""
    samples: int = 1
    """Stories for each prompt."""
    max_new_tokens: int = 300
    """Stop after so many tokens, where the story has not ended before."""
    temperature: float = 0.8
    """Below 1 keeps to the likelier tokens; 0 takes the likeliest each time."""
    max_seq_len: int | None = None
    """Longest text that the model reads, prompt included; where it is not given, as the model was made or published."""
    top_k: int | None = None
    """Draw among the k likeliest tokens only."""
    top_p: float | None = 0.95
    """Draw among the fewest tokens that hold this much probability."""
    unmasking: Unmasking = field(default_factory=Unmasking)
    """How a diffusion model writes; the others ignore it."""
    seed: int = 0
    """The same seed writes the same stories on the same machine."""
    device: str = "auto"
    """auto, cuda, mps or cpu."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the step from one token to the next; auto: on CUDA only, since elsewhere it takes long to pay back, and
    only if that works there."""

    def __post_init__(self):
        self.sampler(0)
        if self.max_seq_len is not None and self.max_seq_len < 1:
            raise ValueError(f"max_seq_len = {self.max_seq_len} must be at least 1 (--max-seq-len)")
        if self.samples < 1 or self.max_new_tokens < 1:
            raise ValueError("samples and max_new_tokens must be at least 1 (--samples, --max-new-tokens)")
        if self.chat and self.samples > 1:
            raise ValueError(f"samples = {self.samples}, but a conversation goes on with one answer (--samples)")
        if not self.chat and (self.system is not None or self.template != "default"):
            raise ValueError("a system message and a chat template belong to a conversation: add --chat")
        for flag, text in [("prompt", each) for each in self.prompt] + [("system", self.system or "")]:
            try:
                text.encode()
            except UnicodeEncodeError:  # Python marks the bytes of a command that are not UTF-8 with surrogates
                raise ValueError(
                    f"the {flag} {text!a} is not valid UTF-8: set the terminal to UTF-8, or convert the text with "
                    f"iconv -f LATIN1 -t UTF-8 before it is given to --{flag}"
                ) from None

    def sampler(self, rows: int, device: torch.device | str = "cpu") -> Sampler:
        """What draws the tokens of so many texts, each from a seed of its own."""
        seeds = (torch.Generator(device).manual_seed(self.seed + row) for row in range(rows))
        return Sampler(tuple(seeds), self.temperature, self.top_k, self.top_p)


@console()
def main(arguments: list[str] | None = None) -> None:
    """The command: stream one story, or print several, each under its number."""
    flags = tyro.cli(Arguments, args=arguments, prog="python -m llm.generate")
    device = find_device(flags.device)
    template = load_chat_template(flags.path, flags.template) if flags.chat else None
    model, tokenizer = load_run(flags.path, device, flags.max_seq_len)
    if not model.causal:
        model.unmasking = flags.unmasking
    if wants_compiling(flags.compile, device):
        compile_decoding(model, insist=flags.compile == "on")
    stop = gguf_stop_tokens(flags.path) or stop_tokens(flags.path)
    if template is None:
        return tell(flags, model, tokenizer, stop)
    end = tokenizer.token_to_id(template.special_tokens.get("eos_token", ""))
    stop = {*stop, *([] if end is None else [end])}
    messages = flags.prompt or read_messages(sys.stdin)
    converse(model, tokenizer, template, messages, flags.max_new_tokens, flags.sampler(1, device), stop, flags.system)


def tell(flags: Arguments, model: Transformer, tokenizer: Tokenizer, stop: Collection[int]) -> None:
    """Continue each prompt, `samples` times."""
    prompts = [prompt for prompt in flags.prompt or ("Once upon a time",) for _ in range(flags.samples)]
    sampler = flags.sampler(len(prompts), model.tok_embed.weight.device)
    say_full = partial(explain_limit, model.config.max_seq_len)
    if len(prompts) == 1:
        print(prompts[0], end="", flush=True)
        write(model, tokenizer, prompts, flags.max_new_tokens, sampler, stream, say_full, stop)
        print()
        return
    stories = write(model, tokenizer, prompts, flags.max_new_tokens, sampler, on_full=say_full, stop=stop)
    for number, story in enumerate(stories, 1):
        print(f"--- {number} ---\n{story}\n")


def explain_limit(max_seq_len: int) -> None:
    """Say why a text has no end."""
    print(f"\n(stopped at max_seq_len = {max_seq_len}, the longest text this model was built for)", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, CheckpointError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        with console():
            print()
        sys.exit(130)
