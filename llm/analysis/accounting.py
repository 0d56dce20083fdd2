"""What a model costs, by formula: parameters, FLOPs per token, cache bytes per token.

    forward FLOPs per token = 2 * matrix parameters + 2 * (width of scores + width of values) * keys, over all layers
    training                = 3 * forward: the backward pass needs two products for each one of the forward pass

A multiplication and an addition are two FLOPs. Norms, activations and softmax are left out; they are a few percent.
`keys` is the number of keys that a query sees, on average over one text of `context` tokens: (context + 1) / 2 under a
causal mask, at most the window's size under a window. A kernel that computes all scores and then masks them takes
`context` keys instead. Only the experts that a token goes to are counted. An embedding costs nothing, and the head
costs one product with its matrix.

Scaling Laws for Neural Language Models, arXiv 2001.08361, section 2.1; PaLM, arXiv 2204.02311, appendix B.
Blog: Attention, MHA and its cost.
"""

from torch import nn

from llm.models.transformer import Transformer
from llm.modules.kernels.cross_entropy import BLOCK


def describe(model: Transformer, context: int | None = None) -> dict[str, float]:
    """The costs of `model` on texts of `context` tokens (default: max_seq_len).

    parameters, active_parameters      all of them; those that one token uses
    flops_per_token                    forward pass, mean over the tokens of one text
    training_flops_per_token           forward and backward pass, of both copies of the text in block diffusion
    flops_per_written_token            the forward pass, or as many as a diffusion model needs for each token it writes
    cache_bytes_per_token              cache of a full context, in the weights' dtype, divided by its tokens; under a
                                       window or with a recurrent state it falls as the context grows
    """
    context = context or model.config.max_seq_len
    flops, head = forward_flops(model, context), 2 * model.head_weight().numel()
    passes = model.passes_per_token(context)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "active_parameters": active_parameters(model),
        "flops_per_token": flops,
        "training_flops_per_token": 3 * (passes["training_blocks"] * (flops - head) + head),
        "flops_per_written_token": passes["writing_blocks"] * (flops - head) + passes["writing_head"] * head,
        "cache_bytes_per_token": cache_bytes(model, context) / context,
    }


def sharded_memory(model: Transformer, n_ranks: int, windows: int, context: int) -> dict[str, float]:
    """Bytes on each of `n_ranks` GPUs that train a dense `model` with --shard and --recompute in bf16 autocast, for
    micro-batches of `windows` texts of `context` tokens. `model` may be on the meta device.

    weights, gradients, optimiser    fp32, and AdamW's two means in fp32: 4, 4 and 8 bytes a parameter over the ranks
    outside_blocks                   embedding, head and final norm, gathered for the whole step, and their gradients
    blocks                           two gathered blocks, the one that computes and the next, in fp32, since autocast
                                     rounds them only then; the bf16 copy of one, and the gradients of one
    activations                      the fp32 input of every block, and what the linear layers of one read and write
                                     in bf16
    loss                             8,192 rows of logits in fp32 and bf16, the head in bf16 and its gradient in fp32

    Buffers of the allocator and of NCCL come on top.
    """
    tokens, c = windows * context, model.config
    everything = sum(p.numel() for p in model.parameters())
    block = max(sum(p.numel() for p in block.parameters()) for block in model.blocks)
    outside = everything - sum(p.numel() for p in model.blocks.parameters())
    layers = [m for m in model.blocks[-1].modules() if isinstance(m, nn.Linear)]
    width = sum(layer.in_features + layer.out_features for layer in layers)
    found = {
        "weights": 4 * everything / n_ranks,
        "gradients": 4 * everything / n_ranks,
        "optimiser": 8 * everything / n_ranks,
        "outside_blocks": (4 + 4) * outside,
        "blocks": (2 * 4 + 2 + 4) * block,
        "activations": tokens * (4 * c.n_layers * c.d_model + 2 * width),
        "loss": min(tokens, BLOCK) * c.vocab_size * (4 + 2) + c.vocab_size * c.d_model * (2 + 4),
    }
    return found | {"total": sum(found.values())}


def summary(model: Transformer) -> str:
    """The same costs as text, in aligned lines: three, and for a diffusion model a fourth."""
    context = model.config.max_seq_len
    costs = describe(model, context)
    total, active = costs["parameters"], costs["active_parameters"]
    return (
        f"parameters  {units(total)}{f', {units(active)} of them active in a token' if active < total else ''}\n"
        f"compute     {units(costs['flops_per_token'])}FLOPs a token forward, "
        f"{units(costs['training_flops_per_token'])}FLOPs in training, at context {context:,}\n"
        f"cache       {units(costs['cache_bytes_per_token'])}B a token"
        + ("" if model.causal else f"\nwriting     {units(costs['flops_per_written_token'])}FLOPs a written token")
    )


def units(value: float) -> str:
    """Three digits and a prefix: 17_707_520 -> '17.7 M'."""
    prefixes = iter("kMGT")
    prefix = ""
    while value >= 999.5 and prefix != "T":
        value, prefix = value / 1000, next(prefixes)
    return f"{f'{value:#.3g}'.rstrip('.')} {prefix}"


def active_parameters(model: Transformer) -> int:
    """The parameters that one token uses: all but those of experts it does not go to and of parts only for training."""
    modules = modules_at_work(model, remove_duplicate=True)
    idle = sum(module.idle_parameters() for module in modules if hasattr(module, "idle_parameters"))
    unused = sum(p.numel() for name in model.training_only for p in getattr(model, name).parameters())
    return round(sum(p.numel() for p in model.parameters()) - idle - unused)


def modules_at_work(model: Transformer, remove_duplicate: bool) -> list[nn.Module]:
    """All modules except the parts that only training runs."""
    named = model.named_modules(remove_duplicate=remove_duplicate)
    return [module for name, module in named if name.split(".")[0] not in model.training_only]


def forward_flops(model: Transformer, context: int) -> float:
    """FLOPs per token of one text of `context` tokens. A module that occurs twice in the model is computed twice."""
    head = 2 * model.head_weight().numel() if model.config.tie_embeddings else 0  # else lm_head is among the modules
    return head + sum(own_flops(module, context) for module in modules_at_work(model, remove_duplicate=False))


def own_flops(module: nn.Module, context: int) -> float:
    """FLOPs per token of `module` itself, without its submodules.

    A linear layer is one product. Any other module that computes something says how much: `flops(context)`, per token
    of a text of `context` tokens. An MoE layer also says how many of its parameters a token leaves out, on average:
    `idle_parameters()`.
    """
    if hasattr(module, "flops"):
        return module.flops(context)
    return 2 * module.weight.numel() if isinstance(module, nn.Linear) else 0


def cache_bytes(model: Transformer, context: int) -> int:
    """Bytes of the cache for one text of `context` tokens, without the positions of its slots. A cache that several
    layers share is counted once."""
    layers = {id(layer): layer for layer in model.make_cache(1, context).layers}
    tensors = [tensor for layer in layers.values() for tensor in layer.values()]
    return sum(tensor.nbytes for tensor in tensors if tensor.is_floating_point())
