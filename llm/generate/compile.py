"""Compile what runs again and again, and go on without compiling where that fails.

Generation repeats one step, from one token of each text to the next; `compile_decoding` compiles it. The switches of
torch's compiler that it needs are set for these compilations only.
"""

import sys
from collections.abc import Callable
from typing import Literal, TextIO, TypeVar

import torch
from torch import Tensor, nn

from llm.models.transformer import Transformer
from llm.modules.cache import Cache

Result = TypeVar("Result")

CPU_OPTIONS = {
    "cpp.enable_concat_linear": True,  # weights that multiply the same input, such as q, k and v, become one
    "cpp_wrapper": True,  # kernels are called from C++, not from Python
    "size_asserts": False,  # no checks in Python after each product
    "alignment_asserts": False,
}


def wants_compiling(wish: Literal["auto", "on", "off"], device: torch.device) -> bool:
    """Whether to compile for a device. auto: on CUDA only, since elsewhere compiling takes long to pay back."""
    return device.type == "cuda" if wish == "auto" else wish == "on"


def try_compiled(
    compiled: Callable[[], Result], eager: Callable[[], Result], insist: bool, file: TextIO | None = None
) -> Result:
    """`compiled()`; where compiling fails and is not insisted on, `eager()` after one line on `file` that says why."""
    try:
        return compiled()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if insist:
            raise
        print(not_compiled(error), file=file, flush=True)
    return eager()


def not_compiled(error: Exception) -> str:
    """One line on why torch.compile failed: the error of its backend, without the pages that follow."""
    error = getattr(error, "inner_exception", error)
    reason = (str(error).strip().splitlines() or ["no reason given"])[0]
    return f"not compiled: {type(error).__name__}: {reason[:200]}"


def compile_decoding(model: Transformer, insist: bool = True) -> None:
    """Compile the step that `model.generate` repeats. Where that fails and is not insisted on, one line on the standard
    error says why, and generation goes on uncompiled.

    The first step compiles, and so does the first step after the cache has grown; from then on the compiled code serves
    any number of slots. The model, its weights included, must not change any more.
    """
    eager = model.decode

    def first_step(tokens: Tensor, cache: Cache) -> Tensor:
        seen = cache.seen.clone()

        def compiled() -> Tensor:
            model.decode = compile_for_cuda(eager) if tokens.is_cuda else compile_for_cpu(eager)
            return model.decode(tokens, cache)

        def uncompiled() -> Tensor:
            model.decode = eager
            cache.seen.copy_(seen)  # the step may have failed after it had counted its tokens
            return eager(tokens, cache)

        return try_compiled(compiled, uncompiled, insist, sys.stderr)

    model.decode = first_step


def compile_for_cuda(decode: Callable[[Tensor, Cache], Tensor]) -> Callable[[Tensor, Cache], Tensor]:
    """The step as a CUDA graph, which is recorded once and replayed with one launch instead of one for each kernel.

    A graph reads and writes the addresses at which it was recorded, so the cache is marked as staying where it is.
    """
    replay = torch.compile(decode, mode="reduce-overhead")

    def step(tokens: Tensor, cache: Cache) -> Tensor:
        for tensor in (cache.seen, *(tensor for layer in cache.layers for tensor in layer.values())):
            torch._dynamo.mark_static_address(tensor)
        torch.compiler.cudagraph_mark_step_begin()  # the last step's logits are not needed any more
        return replay(tokens, cache)

    return step


def compile_for_cpu(decode: Callable[[Tensor, Cache], Tensor]) -> Callable[[Tensor, Cache], Tensor]:
    """The step with its weights frozen: they are stored once more, in the layout that the CPU's products read fastest.

    torch asks for `freezing` before it calls the compiler, so no option of one compilation can carry it. It is set
    around the steps that may compile: those whose cache has a new shape.
    """
    from torch._inductor import config as inductor  # takes seconds to import

    fast = torch.compile(decode, options=CPU_OPTIONS | {"guard_filter_fn": enough_guards})
    compiled_shapes = set()

    def step(tokens: Tensor, cache: Cache) -> Tensor:
        shape = tuple(tensor.shape for layer in cache.layers for tensor in layer.values())
        if shape in compiled_shapes:
            return fast(tokens, cache)
        with inductor.patch(freezing=True):
            logits = fast(tokens, cache)
        compiled_shapes.add(shape)
        return logits

    return step


def enough_guards(guards: list) -> list[bool]:
    """Which of torch's checks that a compiled step still fits are repeated at each step.

    The checks of the text and its cache are repeated. For a module with weights, only one check is repeated: that one
    of its weights is the same tensor as before. It tells apart models that share code, and layers where a step breaks
    into several graphs. For a module without weights, all checks are repeated.
    """
    of_module = [guard.name.startswith("self") for guard in guards]
    weights = [g for g, own in zip(guards, of_module, strict=True) if own and isinstance(g.value, nn.Parameter)]
    known = [g for g in weights if g.guard_type == "ID_MATCH"][:1]
    return [not known or g is known[0] or not (own or g.is_global) for g, own in zip(guards, of_module, strict=True)]
