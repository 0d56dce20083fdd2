"""Nemotron-H and Nemotron 3 as published. Their prediction modules are left out, as transformers leaves them out."""

from typing import Any

from llm.hub.maps.common import OURS, fields
from llm.hub.maps.mamba import mamba_rows
from llm.hub.tables import PretrainedError, Published, Row, require, same
from llm.models.case_studies.nemotron_h import NemotronH

# kernels, how parameters were drawn, training; settings of RoPE, which this attention does not have; and second
# spellings of other fields
SAME_RESULT = (
    "use_mamba_kernels chunk_size mamba_ssm_cache_dtype moe_shared_expert_overlap time_step_max time_step_floor "
    "time_step_limit rescale_prenorm_residual residual_in_fp32 num_logits_to_keep expand num_nextn_predict_layers "
    "mtp_layers_block_type mtp_hybrid_override_pattern mamba_proj_bias rope_theta partial_rotary_factor norm_eps "
    "rms_norm_eps attention_head_dim"
)
LETTERS = {
    **{"linear_attention": "M", "full_attention": "*", "moe": "E", "mlp": "-"},
    **{"mamba": "M", "attention": "*"},  # as transformers called them before 5
}


def rows(root: str) -> tuple[Row, ...]:
    """Files on the hub say `backbone`, transformers 5 says `model`."""
    theirs = root + ".layers.{layer}."
    return (
        ("tok_embed.weight", root + ".embeddings.weight", same),
        ("norm.weight", root + ".norm_f.weight", same),
        (OURS + "mixer_norm.weight", theirs + "norm.weight", same),
        (OURS + "ffn_norm.weight", theirs + "norm.weight", same),
        *mamba_rows(OURS + "mixer.", theirs + "mixer."),
        (OURS + "mixer.*", theirs + "mixer.*", same),
        (OURS + "ffn.router.weight", theirs + "mixer.gate.weight", same),
        (OURS + "ffn.router.expert_bias", theirs + "mixer.gate.e_score_correction_bias", same),
        (OURS + "ffn.experts.up_proj[{expert}]", theirs + "mixer.experts.{expert}.up_proj.weight", same),
        (OURS + "ffn.experts.down_proj[{expert}]", theirs + "mixer.experts.{expert}.down_proj.weight", same),
        (OURS + "ffn.shared.*", theirs + "mixer.shared_experts.*", same),
        (OURS + "ffn.latent_in_proj.*", theirs + "mixer.fc1_latent_proj.*", same),
        (OURS + "ffn.latent_out_proj.*", theirs + "mixer.fc2_latent_proj.*", same),
        (OURS + "ffn.*", theirs + "mixer.*", same),  # and experts that are stacked
    )


def read(left: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """The pattern, as letters or as words. Raises PretrainedError for other letters and words."""
    words, letters = left.pop("layers_block_type", None), left.pop("hybrid_override_pattern", None)
    words = left.pop("layer_types", None) or words
    if words is not None:
        known = isinstance(words, list) and words and all(isinstance(word, str) and word in LETTERS for word in words)
        if not known:
            raise PretrainedError(f"config.json sets layers_block_type = {words}: known are {', '.join(LETTERS)}")
        pattern = "".join(LETTERS[word] for word in words)
    else:
        pattern = "ME*-" if letters is None else letters
        if not isinstance(pattern, str) or not pattern or set(pattern) - set("M*-E"):
            raise PretrainedError(f"config.json sets hybrid_override_pattern = {pattern!r}: it must be M, *, - and E")
    left.pop("num_hidden_layers", None)  # which transformers ignores, too
    for name, field in (("mamba_num_groups", "n_mamba_groups"), ("mamba_state_dim", "d_state")):  # a second time
        require(name, left.pop(name, ours[field]), (ours[field],))
    return {"pattern": pattern, "n_layers": len(pattern)}


def write(config: NemotronH.Config) -> dict[str, Any]:
    """Raises PretrainedError for a tied head, which transformers does not have."""
    if config.tie_embeddings:
        raise PretrainedError(
            "transformers ties no head of a NemotronHForCausalLM, so a model with tied embeddings cannot be exported: "
            "train it without --model.tie-embeddings"
        )
    pattern = "".join(map(config.kind, range(config.n_layers)))
    return {"hybrid_override_pattern": pattern, "head_dim": config.head_width}


PUBLISHED = {
    NemotronH: Published(
        model_type="nemotron_h",
        architecture="NemotronHForCausalLM",
        names=(("lm_head.weight", "lm_head.weight", same), *rows("backbone"), *rows("model")),
        fields=fields(
            {
                **dict(norm_eps="layer_norm_epsilon", n_mamba_heads="mamba_num_heads", d_state="ssm_state_size"),
                **dict(mamba_head_dim="mamba_head_dim", n_mamba_groups="n_groups", dt_min="time_step_min"),
                **dict(n_experts="n_routed_experts", d_latent="moe_latent_size"),
                **dict(d_shared="moe_shared_expert_intermediate_size"),
            },
            **dict(vocab_size=131_072, max_seq_len=4096, d_model=4096, n_heads=32, n_kv_heads=8, head_dim=128),
            **dict(d_ff=21_504, norm_eps=1e-5, n_mamba_heads=128, mamba_head_dim=64),
            **dict(n_mamba_groups=8, d_state=128, d_conv=4, dt_min=0.001, n_experts=8, top_k=2, d_expert=7688),
            **dict(d_shared=7688, d_latent=None, n_groups=1, top_k_groups=1, normalize_weights=True),
            **dict(routed_scaling_factor=1.0),
        ),
        required={
            "tie_word_embeddings": (False,),
            "mamba_hidden_act": ("silu",),
            "mlp_hidden_act": ("relu2",),
            "use_bias": (False,),
            "use_conv_bias": (True,),
            "attention_bias": (False,),
            "mlp_bias": (False,),
            "n_shared_experts": (1,),
            "sliding_window": (None,),
        },
        ignored=frozenset(SAME_RESULT.split()),
        ignored_weights=lambda config: r"mtp\..*",
        read=read,
        write=write,
    )
}
COMMON = dict(vocab_size=131_072, tie_embeddings=False, n_mamba_groups=8, head_dim=128, n_experts=8, top_k=2)
DENSE = dict(COMMON, d_expert=7688, d_shared=7688)
SIZES = {
    NemotronH: {
        "nemotron-h-8b": dict(
            **dict(DENSE, pattern="M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-", n_layers=52, d_ff=21_504),
            **dict(max_seq_len=8192, d_model=4096, n_heads=32, n_kv_heads=8, n_mamba_heads=128, mamba_head_dim=64),
        ),
        "nemotron-nano-9b-v2": dict(
            **dict(DENSE, pattern="M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-", n_layers=56, d_ff=15_680),
            **dict(max_seq_len=131_072, d_model=4480, n_heads=40, n_kv_heads=8, n_mamba_heads=128, mamba_head_dim=80),
        ),
        "nemotron-3-nano-30b-a3b": dict(
            **dict(COMMON, pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME", n_layers=52, d_ff=1856)
            | dict(n_experts=128, top_k=6, d_expert=1856, d_shared=3712, routed_scaling_factor=2.5),
            **dict(max_seq_len=262_144, d_model=2688, n_heads=32, n_kv_heads=2, n_mamba_heads=64, mamba_head_dim=64),
        ),
    }
}
