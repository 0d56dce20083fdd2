"""GPT-2 as published: matrices stored (in, out), and those of queries, keys and values side by side in one."""

from typing import Any

from llm.hub.maps.common import fields
from llm.hub.tables import Published, Row, require, same, split, transpose
from llm.models.case_studies.gpt2 import GPT2


def rows(prefix: str) -> tuple[Row, ...]:
    ours, theirs = "blocks.{layer}.", prefix + "h.{layer}."
    weights, biases = (tuple(f"{ours}mixer.{name}_proj.{kind}" for name in "qkv") for kind in ("weight", "bias"))
    return (
        ("tok_embed.weight", prefix + "wte.weight", same),
        ("position.table.weight", prefix + "wpe.weight", same),
        ("norm.*", prefix + "ln_f.*", same),
        (ours + "mixer_norm.*", theirs + "ln_1.*", same),
        (ours + "ffn_norm.*", theirs + "ln_2.*", same),
        (weights, theirs + "attn.c_attn.weight", transpose.then(split(3))),
        (biases, theirs + "attn.c_attn.bias", split(3)),
        (ours + "mixer.o_proj.weight", theirs + "attn.c_proj.weight", transpose),
        (ours + "mixer.o_proj.bias", theirs + "attn.c_proj.bias", same),
        (ours + "ffn.up_proj.weight", theirs + "mlp.c_fc.weight", transpose),
        (ours + "ffn.up_proj.bias", theirs + "mlp.c_fc.bias", same),
        (ours + "ffn.down_proj.weight", theirs + "mlp.c_proj.weight", transpose),
        (ours + "ffn.down_proj.bias", theirs + "mlp.c_proj.bias", same),
    )


# names of transformers for three functions; the first of each is the one that export writes
ACTIVATIONS = {
    "gelu_tanh": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate", "gelu_python_tanh"),
    "gelu": ("gelu", "gelu_python"),
    "quick_gelu": ("quick_gelu",),
}


def read(left: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    name = left.pop("activation_function", "gelu_new")
    require("activation_function", name, [theirs for names in ACTIVATIONS.values() for theirs in names])
    activation = next(our for our, names in ACTIVATIONS.items() if name in names)
    return {"d_ff": ours["d_ff"] or 4 * ours["d_model"], "activation": activation}


DROPOUT = {"attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_first_dropout"}
SUMMARY = {"summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels"}  # of another head
PUBLISHED = {
    GPT2: Published(
        model_type="gpt2",
        architecture="GPT2LMHeadModel",
        # transformers writes the prefix today; OpenAI's four models were saved without it
        names=(*rows("transformer."), *rows(""), ("lm_head.weight", "lm_head.weight", same)),
        fields=fields(
            dict(
                **dict(max_seq_len="n_positions", d_model="n_embd", n_layers="n_layer", n_heads="n_head"),
                **dict(d_ff="n_inner", norm_eps="layer_norm_epsilon"),
            ),
            **dict(vocab_size=50_257, max_seq_len=1024, d_model=768, n_layers=12, n_heads=12, d_ff=None),
            **dict(norm_eps=1e-5, tie_embeddings=True),
        ),
        required={"scale_attn_weights": (True,)},
        ignored=frozenset(
            DROPOUT | SUMMARY | {"n_ctx", "output_past", "predict_special_tokens", "reorder_and_upcast_attn"}
        ),
        ignored_weights=lambda config: r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",  # the causal mask
        fixed_length=True,
        read=read,
        write=lambda config: {"activation_function": ACTIVATIONS[config.activation][0]},
    )
}


def widths(d_model: int, n_layers: int, n_heads: int) -> dict:
    sizes = {"d_model": d_model, "n_layers": n_layers, "n_heads": n_heads, "d_ff": 4 * d_model}
    return {**sizes, "vocab_size": 50_257, "max_seq_len": 1024}


SIZES = {
    GPT2: {
        "gpt2": widths(768, 12, 12),
        "gpt2-medium": widths(1024, 24, 16),
        "gpt2-large": widths(1280, 36, 20),
        "gpt2-xl": widths(1600, 48, 25),
    }
}
