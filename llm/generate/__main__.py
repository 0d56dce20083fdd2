"""Write text with a trained model.

    python -m llm.generate runs/baseline --prompt "Once upon a time"
    python -m llm.generate path/to/checkpoint --prompt "The capital of France is"        # a folder as the hub has it

Each new token is drawn from the model's distribution, reshaped by temperature, top-k (Hierarchical Neural Story
Generation, arXiv 1805.04833) and top-p (The Curious Case of Neural Text Degeneration, arXiv 1904.09751).
"""

import json
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro
from tokenizers import Tokenizer
from torch import Tensor, nn

from llm.checkpoint import CheckpointError, find_checkpoints, load_model_weights, newest_good, verify_checkpoint
from llm.device import find_device, not_compiled
from llm.hub_folder import is_hub_folder, load_hub_tokenizer, stop_tokens
from llm.models import MODELS
from llm.models.transformer import Transformer
from llm.modules.cache import Cache
from llm.pretrained import load_pretrained
from llm.tokenization import END_OF_TEXT, load_tokenizer


@dataclass(frozen=True)
class Sampler:
    """Logits (B, V) -> one token for each row (B,).

    temperature divides the logits, 0 takes the likeliest token; top_k keeps the k likeliest; top_p keeps the fewest
    tokens that hold that much probability. Row b draws from its own generator, whatever else is in the batch.
    """

    generators: tuple[torch.Generator, ...]
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits.float() / self.temperature
        if self.top_k is not None:
            least = logits.topk(min(self.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p is not None:
            ordered, order = logits.softmax(-1).sort(descending=True)
            surplus = ordered.cumsum(-1) - ordered >= self.top_p  # the likeliest token always stays
            logits = logits.masked_fill(surplus.gather(-1, order.argsort(-1)), -torch.inf)
        rows = zip(logits.softmax(-1), self.generators, strict=True)
        return torch.cat([row.multinomial(1, generator=generator) for row, generator in rows])


def greedy(logits: Tensor) -> Tensor:
    """The likeliest token of each row: (B, V) -> (B,). In fp32: bf16 is compared five times as slowly on a CPU."""
    return logits.float().argmax(-1)


def generate_tokens(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampler: Callable[[Tensor], Tensor],
    stop: int | Collection[int],
) -> Iterator[list[int | None]]:
    """Continue prompts of different lengths in one batch: yields the next token of each, None once it has ended.

    A text ends after a token of `stop`, which is yielded. Raises ValueError for a prompt that leaves no room.
    """
    stop = {stop} if isinstance(stop, int) else set(stop)
    longest, limit = max(map(len, prompts)), model.config.max_seq_len
    if longest >= limit:
        raise ValueError(f"a prompt has {longest} tokens, and max_seq_len = {limit} leaves no room: shorten it")
    device = model.tok_embed.weight.device
    batch = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    ended = [False] * len(prompts)
    for step in model.generate(batch, max_new_tokens, sampler, padding):
        tokens = [None if end else token for token, end in zip(step.tolist(), ended, strict=True)]
        yield tokens
        ended = [end or token in stop for token, end in zip(tokens, ended, strict=True)]
        if all(ended):
            return


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
    """The prompts and what the model wrote after them. Each is told to the model as the beginning of a document.

    `on_text(row, text)` is called with each new piece of text as soon as its characters are complete, `on_full()` at
    the end where max_seq_len cut a text short. `stop` are the tokens that end a text: `<|endoftext|>` where none is
    given and the tokenizer has it.
    """
    stop = set(stop or end_of_text(tokenizer))
    beginnings = [begin(tokenizer, prompt) for prompt in prompts]
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


def begin(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The tokens of a document that begins with `prompt`: after `<|endoftext|>`, as training has it, or as a tokenizer
    says that brings a rule of its own, as those of hub folders do. Raises ValueError where that is nothing at all."""
    ids = tokenizer.encode(prompt).ids
    if tokenizer.post_processor is None:
        ids = end_of_text(tokenizer) + ids
    if not ids:
        raise ValueError("the prompt is empty, and this tokenizer puts nothing before a text: give a --prompt")
    return ids


def end_of_text(tokenizer: Tokenizer) -> list[int]:
    """`<|endoftext|>`, or nothing where a tokenizer has no such token."""
    token = tokenizer.token_to_id(END_OF_TEXT)
    return [] if token is None else [token]


def compile_decoding(model: Transformer, insist: bool = True) -> None:
    """Compile the step that `model.generate` repeats; where that fails and is not insisted on, the first step says why
    and goes on eagerly.

    The first new token then waits for the compiler, and once more the first that makes the cache grow: from there on
    torch leaves the number of slots open.
    """
    eager = model.decode

    def first(tokens: Tensor, cache: Cache) -> Tensor:
        seen = cache.seen.clone()
        try:
            model.decode = compiled(eager, cuda=tokens.is_cuda)
            return model.decode(tokens, cache)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if insist:
                raise
            print(not_compiled(error), file=sys.stderr)
        model.decode = eager
        cache.seen.copy_(seen)  # whatever the step had done already, it is done again
        return eager(tokens, cache)

    model.decode = first


def compiled(decode: Callable[[Tensor, Cache], Tensor], cuda: bool) -> Callable[[Tensor, Cache], Tensor]:
    """The step as one compiled function. The model must stay as it is from here on, its weights and all else.

    On CUDA the step is recorded and replayed as one graph, which spares the launch of each kernel. A graph writes
    where it wrote when it was recorded: hence the fixed addresses."""
    if not cuda:
        from torch._inductor import config as inductor  # costs seconds

        inductor.freezing = True  # weights are laid out once as the CPU's products want them: they must not change now
        inductor.cpp.enable_concat_linear = True  # and those that multiply the same input, q k v, become one
        inductor.size_asserts = inductor.alignment_asserts = False  # a check in Python after each product
        inductor.cpp_wrapper = True  # the kernels are called from C++, too
        return torch.compile(decode, options={"guard_filter_fn": enough_guards})
    replay = torch.compile(decode, mode="reduce-overhead")

    def step(tokens: Tensor, cache: Cache) -> Tensor:
        for tensor in (cache.seen, *(tensor for layer in cache.layers for tensor in layer.values())):
            torch._dynamo.mark_static_address(tensor)
        torch.compiler.cudagraph_mark_step_begin()  # the last step's logits are not needed any more
        return replay(tokens, cache)

    return step


def enough_guards(guards: list) -> list[bool]:
    """Which of torch's checks that a compiled step still fits are repeated at each step: those of the text and its
    cache and, of a module, that one of its weights is the same tensor as before. This tells models apart that share
    code, and layers where a step breaks into several graphs. A module that uses no weight is checked whole."""
    of_module = [guard.name.startswith("self") for guard in guards]
    weights = [g for g, own in zip(guards, of_module, strict=True) if own and isinstance(g.value, nn.Parameter)]
    known = [g for g in weights if g.guard_type == "ID_MATCH"][:1]
    return [not known or g is known[0] or not (own or g.is_global) for g, own in zip(guards, of_module, strict=True)]


def load_run(path: Path, device: torch.device) -> tuple[Transformer, Tokenizer]:
    """The model and the tokenizer of a run directory (its newest good checkpoint), a checkpoint or a hub folder.

    Raises CheckpointError where there is none, where a file is not what was saved, or where this code does not know the
    model; PretrainedError for a hub folder that cannot be read.
    """
    if is_hub_folder(path):
        return load_pretrained(path, device=device), load_hub_tokenizer(path)
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    checkpoint = newest_good(folder) if find_checkpoints(folder) else folder
    if checkpoint is None or not (checkpoint / "manifest.json").is_file():
        raise CheckpointError(f"{path} holds no complete checkpoint: name a run directory that training wrote")
    verify_checkpoint(checkpoint)
    with torch.device("meta"):
        model = build_model(checkpoint)
    model.to_empty(device=device)
    load_model_weights(checkpoint, model)
    return model.eval(), load_tokenizer(checkpoint / "tokenizer-bpe.json")


def build_model(checkpoint: Path) -> Transformer:
    """The model of a checkpoint's config.json; raises CheckpointError for a name or a field that is not known here."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    name, settings = config["model_name"], config["model"]
    advice = "use the version of this code that wrote it"
    if name not in MODELS:
        raise CheckpointError(f"{checkpoint} holds a {name!r}; known are {', '.join(MODELS)}: {advice}")
    Model, Config = MODELS[name]
    unknown = sorted(settings.keys() - {field.name for field in fields(Config)})
    if unknown:
        raise CheckpointError(f"{checkpoint} sets {', '.join(unknown)}, which a {name!r} does not have here: {advice}")
    return Model(Config(**settings))


@dataclass(frozen=True)
class Arguments:
    """Write stories with a trained model."""

    path: tyro.conf.Positional[Path]
    """Run directory, checkpoint, or folder of a published model as the hub has it."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """How the story begins; give the flag several times for several stories."""
    samples: int = 1
    """Stories for each prompt."""
    max_new_tokens: int = 300
    """Stop after so many tokens, where the story has not ended before."""
    temperature: float = 0.8
    """Below 1 keeps to the likelier tokens; 0 takes the likeliest each time."""
    top_k: int | None = None
    """Draw among the k likeliest tokens only."""
    top_p: float | None = 0.95
    """Draw among the fewest tokens that hold this much probability."""
    seed: int = 0
    """The same seed writes the same stories on the same machine."""
    device: str = "auto"
    """auto, cuda, mps or cpu."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the step from one token to the next; auto: on CUDA only, since elsewhere it takes long to pay back, and
    only if that works there."""

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"temperature = {self.temperature} must not be negative (--temperature)")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k = {self.top_k} must be at least 1 (--top-k)")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p} must lie in (0, 1] (--top-p)")
        if self.samples < 1 or self.max_new_tokens < 1:
            raise ValueError("samples and max_new_tokens must be at least 1 (--samples, --max-new-tokens)")


def main(arguments: list[str] | None = None) -> None:
    """The command: stream one story, or print several, each under its number."""
    flags = tyro.cli(Arguments, args=arguments)
    device = find_device(flags.device)
    model, tokenizer = load_run(flags.path, device)
    if flags.compile == "on" or (flags.compile == "auto" and device.type == "cuda"):
        compile_decoding(model, insist=flags.compile == "on")
    prompts = [prompt for prompt in flags.prompt or ("Once upon a time",) for _ in range(flags.samples)]
    seeds = [torch.Generator(device).manual_seed(flags.seed + row) for row in range(len(prompts))]
    sampler = Sampler(tuple(seeds), flags.temperature, flags.top_k, flags.top_p)
    stop = stop_tokens(flags.path)
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


def stream(row: int, text: str) -> None:
    """Print a piece of text at once."""
    print(text, end="", flush=True)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, CheckpointError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print()
        sys.exit(130)
