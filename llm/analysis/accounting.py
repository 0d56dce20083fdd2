"""What a model costs, by formula: parameters, FLOPs per token, cache bytes per token.

    forward FLOPs per token = 2 * matrix parameters + 2 * (width of scores + width of values) * keys, over all layers
    training                = 3 * forward: the backward pass needs two products for each one of the forward pass

A multiplication and an addition are two FLOPs; norms, activations and softmax, a few in a hundred, are left out. `keys`
is how many keys a query sees, on average over one text of `context` tokens: (context + 1) / 2 under a causal mask, at
most the window under a window. Kernels that skip what is hidden compute just that; those that compute every score and
then mask it take `context` keys. Of experts only those count that a token goes to. Looking up an embedding costs
nothing, the head as much as its matrix.

Scaling Laws for Neural Language Models, arXiv 2001.08361, section 2.1; PaLM, arXiv 2204.02311, appendix B.
Blog: Attention, MHA and its cost.
"""

from functools import lru_cache

import torch
from torch import nn

from llm.models.transformer import Transformer
from llm.modules.attention.latent import LatentAttention
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.ffn.moe import MoE
from llm.modules.ffn.router import Router
from llm.modules.masks import Visible, visibility
from llm.modules.position_encoding.relative import RelativeAttention


def describe(model: Transformer, context: int | None = None) -> dict[str, float]:
    """The costs of `model` on texts of `context` tokens (default: max_seq_len).

    parameters, active_parameters      all of them; those that one token's way leads through
    flops_per_token                    forward pass, mean over the tokens of one text
    training_flops_per_token           forward and backward pass
    cache_bytes_per_token              cache of a full context, in the weights' dtype, divided by its tokens: a window
                                       or a recurrent state costs the less a token the longer the text
    """
    context = context or model.config.max_seq_len
    flops = forward_flops(model, context)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "active_parameters": active_parameters(model),
        "flops_per_token": flops,
        "training_flops_per_token": 3 * flops,
        "cache_bytes_per_token": cache_bytes(model, context) / context,
    }


def summary(model: Transformer) -> str:
    """The same in three aligned lines, for people."""
    context = model.config.max_seq_len
    costs = describe(model, context)
    total, active = costs["parameters"], costs["active_parameters"]
    return (
        f"parameters  {units(total)}{f', {units(active)} of them active in a token' if active < total else ''}\n"
        f"compute     {units(costs['flops_per_token'])}FLOPs a token forward, "
        f"{units(costs['training_flops_per_token'])}FLOPs in training, at context {context:,}\n"
        f"cache       {units(costs['cache_bytes_per_token'])}B a token"
    )


def units(value: float) -> str:
    """Three digits and a prefix: 17_707_520 -> '17.7 M'."""
    prefixes = iter("kMGT")
    prefix = ""
    while value >= 999.5 and prefix != "T":
        value, prefix = value / 1000, next(prefixes)
    return f"{f'{value:#.3g}'.rstrip('.')} {prefix}"


def active_parameters(model: Transformer) -> int:
    """Parameters without those of the experts that a token does not go to, and of what only training runs."""
    idle = 0
    for moe in modules_at_work(model, remove_duplicate=True):
        if isinstance(moe, MoE):
            idle += sum(p.numel() for p in moe.experts.parameters()) * (1 - active_share(moe))
    unused = sum(p.numel() for name in model.training_only for p in getattr(model, name).parameters())
    return round(sum(p.numel() for p in model.parameters()) - idle - unused)


def modules_at_work(model: Transformer, remove_duplicate: bool) -> list[nn.Module]:
    """All modules but those that only training runs."""
    named = model.named_modules(remove_duplicate=remove_duplicate)
    return [module for name, module in named if name.split(".")[0] not in model.training_only]


def active_share(moe: MoE) -> float:
    """The share of the experts that one token goes to."""
    return moe.router.top_k / moe.router.n_experts


def forward_flops(model: Transformer, context: int) -> float:
    """FLOPs per token of one text of `context` tokens. A module that stands in the model twice is computed twice."""
    head = 2 * model.head_weight().numel() if model.config.tie_embeddings else 0  # else lm_head is among the modules
    return head + sum(own_flops(module, context) for module in modules_at_work(model, remove_duplicate=False))


def own_flops(module: nn.Module, context: int) -> float:
    """FLOPs per token of `module` itself, without its submodules. A module that computes anything else than those below
    says so by a method `flops(context)`, per token of a text of `context` tokens."""
    if hasattr(module, "flops"):
        return module.flops(context)
    match module:
        case nn.Linear() | Router():
            return 2 * module.weight.numel()
        case MoE():
            matrices = sum(p.numel() for p in module.experts.parameters() if p.dim() == 3)
            return 2 * matrices * active_share(module)
        case RelativeAttention():  # queries times keys, queries times distances, weights times values
            return 6 * module.q_proj.out_features * mean_keys(module.visible, context)
        case MultiHeadAttention():
            return 4 * module.q_proj.out_features * mean_keys(module.visible, context)
        case LatentAttention():
            widths = sum(module.q_split) + module.expanded_split[1]  # a key's and a value's
            return 2 * module.n_heads * widths * mean_keys(module.visible, context)
    return 0


@lru_cache
def mean_keys(visible: Visible, context: int) -> float:
    """How many keys a query sees, on average over the `context` positions of a text.

    Exact up to 4,096 tokens, beyond that over evenly spaced queries: the whole mask would not fit into memory.
    """
    n_queries = min(context, 2**24 // context)
    queries = torch.linspace(0, context - 1, n_queries, dtype=torch.float64, device="cpu").round().long()
    return visibility(visible, queries, torch.arange(context, device="cpu")).sum().item() / n_queries


def cache_bytes(model: Transformer, context: int) -> int:
    """Bytes that one text of `context` tokens keeps, without the positions of the slots. Layers that share a cache
    count once."""
    layers = {id(layer): layer for layer in model.make_cache(1, context).layers}
    tensors = [tensor for layer in layers.values() for tensor in layer.values()]
    return sum(tensor.nbytes for tensor in tensors if tensor.is_floating_point())
