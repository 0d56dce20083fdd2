"""DeepSeek-V2 and V3 are transformers' models, and the prediction modules of V3 are what its report says."""

import itertools
import json
import math
import re
from dataclasses import replace

import pytest
import torch
from conftest import redraw, tiny_model
from parity import EAGER, assert_parity, assert_same_logits, original
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from llm.analysis.accounting import active_parameters
from llm.hub.maps import PUBLISHED, SIZES
from llm.hub.tables import PretrainedError, parts, plan, read_config
from llm.models.case_studies.deepseek_v2 import DeepseekV2
from llm.models.case_studies.deepseek_v3 import DeepseekV3
from llm.modules.multi_token_prediction import PredictionModule
from llm.modules.norms import RMSNorm
from llm.pretrained import export_pretrained, load_pretrained

SHAPE = dict(
    num_key_value_heads=None,
    **dict(vocab_size=97, hidden_size=36, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40),
    **dict(moe_intermediate_size=16, n_routed_experts=8, num_experts_per_tok=3, n_shared_experts=2),
    **dict(q_lora_rank=20, kv_lora_rank=24, qk_nope_head_dim=10, qk_rope_head_dim=12, v_head_dim=14),
    **dict(max_position_embeddings=64, first_k_dense_replace=1, n_group=4, topk_group=2, rms_norm_eps=1e-3),
)
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
V2, V3 = ({"architecture": f"Deepseek{kind}ForCausalLM", **SHAPE} for kind in ("V2", "V3"))
CASES = {
    "v3": (V3, {}),
    "v3, queries without a latent, heads of other widths": (
        V3,
        dict(q_lora_rank=None, num_attention_heads=5, v_head_dim=8, qk_nope_head_dim=16, hidden_size=30),
    ),
    "v3, one group, all layers sparse, tied": (
        V3,
        dict(n_group=1, topk_group=1, first_k_dense_replace=0, tie_word_embeddings=True, routed_scaling_factor=1.7),
    ),
    "v3, yarn": (V3, dict(rope_parameters=YARN | {"mscale": 1.0, "mscale_all_dim": 1.0})),
    "v3, yarn without mscale": (V3, dict(rope_parameters=YARN | {"beta_fast": 8.0})),
    "v3, linear": (V3, dict(rope_parameters={"rope_type": "linear", "rope_theta": 5e3, "factor": 3.0})),
    "v2": (V2, dict(topk_method="group_limited_greedy", routed_scaling_factor=16.0)),
    "v2, tied": (V2, dict(topk_method="greedy", tie_word_embeddings=True)),
    "v2 lite, no groups whatever config.json says": (V2, dict(q_lora_rank=None, topk_method="greedy")),
    "v2, no groups, as null says": (V2, dict(topk_method="greedy", n_group=None, topk_group=None)),
    "v2, yarn of unlike mscales, dense": (
        V2,
        dict(first_k_dense_replace=3, rope_parameters=YARN | {"mscale": 0.7, "mscale_all_dim": 1.2}),
    ),
}


@pytest.mark.parametrize("family, config", CASES.values(), ids=CASES)
def test_logits_gradients_generation_and_export_are_those_of_transformers(tmp_path, family, config):
    assert_parity(tmp_path, **family | config)


def test_stacked_experts_are_read_too(tmp_path):
    oracle = original(**V3)
    oracle.save_pretrained(tmp_path, save_original_format=False)
    assert_same_logits(oracle, load_pretrained(tmp_path))


def published(folder, **changes):
    """Change config.json as DeepSeek's own differs from what transformers writes."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps(config), encoding="utf-8")


def with_prediction_module(weights, layer):
    """V3's module as it is published: a block and more, under the number of a layer; here a copy of layer 2."""
    last = {name: x for name, x in weights.items() if name.startswith("model.layers.2.")}
    module = {name.replace("layers.2.", f"layers.{layer}."): x.clone() for name, x in last.items()}
    return weights | module | {f"model.layers.{layer}.shared_head.head.weight": weights["lm_head.weight"].clone()}


def test_a_checkpoint_as_published_is_read_without_its_prediction_module(tmp_path):
    oracle = original(**V3, rope_parameters=YARN | {"mscale": 1.0, "mscale_all_dim": 1.0})
    oracle.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(with_prediction_module(weights, 3), tmp_path / "model.safetensors")
    parameters = oracle.config.rope_parameters
    published(
        tmp_path,
        **dict(scoring_func="sigmoid", topk_method="noaux_tc", moe_layer_freq=1, ep_size=1, aux_loss_alpha=0.001),
        **dict(seq_aux=True, num_nextn_predict_layers=1, rope_theta=1e4, rope_parameters=None),
        rope_scaling={"type": "yarn"} | {n: v for n, v in parameters.items() if n not in ("rope_type", "rope_theta")},
    )
    model = load_pretrained(tmp_path)
    assert model.config.n_mtp == 0
    assert_same_logits(oracle, model)


@pytest.mark.parametrize("layer, n_modules, left_over", [(3, 0, 3), (4, 1, 4), (4, 2, None), (61, 1, 61)])
def test_prediction_modules_are_as_many_as_config_json_says_and_follow_the_last_layer(
    tmp_path, layer, n_modules, left_over
):
    original(**V3).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(with_prediction_module(weights, layer), tmp_path / "model.safetensors")
    published(tmp_path, num_nextn_predict_layers=n_modules)
    if left_over is None:
        load_pretrained(tmp_path)
    else:
        with pytest.raises(PretrainedError, match=rf"left over: model\.layers\.{left_over}\."):
            load_pretrained(tmp_path)


def store_in_fp8(weights):
    """The tensors as V3 is published (matrices in float8 with a scale for 128 x 128 weights, the rest in bf16 but for
    the routing bias), and what these numbers mean, by a loop over the blocks."""
    stored, meant = {}, {}
    for name, weight in weights.items():
        if "_proj" not in name:
            stored[name] = weight if "bias" in name else weight.bfloat16()
            meant[name] = stored[name].float()
            continue
        n_rows, n_columns = (math.ceil(size / 128) for size in weight.shape)
        scales = torch.randn(n_rows, n_columns).exp2() / 100  # float8 ends at 448
        stored[name], meant[name] = weight.to(torch.float8_e4m3fn), torch.empty_like(weight)
        for i, j in itertools.product(range(n_rows), range(n_columns)):
            block = (slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1)))
            stored[name][block] = (weight[block] / scales[i, j]).to(torch.float8_e4m3fn)
            meant[name][block] = stored[name][block].float() * scales[i, j]
        stored[name + "_scale_inv"] = scales
    return stored, meant


def publish_in_fp8(folder, **sizes):
    """Two folders: `fp8` with the prediction module, two files and an index, and `plain` with what it means."""
    original(**V3 | sizes).save_pretrained(folder / "plain")
    stored, meant = store_in_fp8(load_file(folder / "plain/model.safetensors"))
    save_file(meant, folder / "plain/model.safetensors", metadata={"format": "pt"})
    stored = with_prediction_module(stored, 3)
    (folder / "fp8").mkdir()
    (folder / "fp8/config.json").write_bytes((folder / "plain/config.json").read_bytes())
    fp8 = dict(activation_scheme="dynamic", fmt="e4m3", quant_method="fp8", weight_block_size=[128, 128])
    published(folder / "fp8", quantization_config=fp8)
    where = {name: f"model-{1 + i % 2:05d}-of-000002.safetensors" for i, name in enumerate(sorted(stored))}
    for file in set(where.values()):
        shard = {name: stored[name] for name in stored if where[name] == file}
        save_file(shard, folder / "fp8" / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": where}
    (folder / "fp8/model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def test_a_checkpoint_in_fp8_is_what_a_loop_over_its_blocks_makes_of_it(tmp_path):
    """Widths that are no multiples of 128, below and above it."""
    sizes = dict(hidden_size=144, intermediate_size=300, q_lora_rank=130, kv_lora_rank=260, moe_intermediate_size=129)
    publish_in_fp8(tmp_path, **sizes)
    transformers = pytest.importorskip("transformers")
    ours, plain = (load_pretrained(tmp_path / name, dtype=torch.float32) for name in ("fp8", "plain"))
    for (name, found), expected in zip(ours.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(found, expected), name
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", **EAGER).eval()
    assert_same_logits(theirs, ours)
    assert load_pretrained(tmp_path / "fp8").tok_embed.weight.dtype == torch.bfloat16


def test_a_checkpoint_in_fp8_is_what_transformers_makes_of_it(tmp_path, monkeypatch):
    """In multiples of 128, as it wants them. It asks for a package that it does not use for this."""
    sizes = dict(hidden_size=256, intermediate_size=384, q_lora_rank=128, kv_lora_rank=128, moe_intermediate_size=128)
    heads = dict(num_attention_heads=4, qk_nope_head_dim=32, qk_rope_head_dim=128, v_head_dim=32)
    publish_in_fp8(tmp_path, **sizes, **heads)
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr("transformers.quantizers.quantizer_finegrained_fp8.is_accelerate_available", lambda: True)
    expanded = dict(quantization_config=transformers.FineGrainedFP8Config(dequantize=True), dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", **expanded, **EAGER).float().eval()
    assert_same_logits(theirs, load_pretrained(tmp_path / "fp8", dtype=torch.float32))


@pytest.mark.parametrize(
    "family, changes, named",
    [
        (V3, {"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
        (V3, {"norm_topk_prob": 0}, "norm_topk_prob to 0"),
        (V3, {"rope_interleave": False}, "rope_interleave = False"),
        (V3, {"num_key_value_heads": 1}, "num_key_value_heads = 1"),
        (V2, {"topk_method": "noaux_tc"}, "topk_method = 'noaux_tc'"),
        (V2, {"norm_topk_prob": True}, "norm_topk_prob = True"),
        (V2, {"moe_layer_freq": 2}, "moe_layer_freq = 2"),
        (V2, {"num_experts_per_tok": None}, "num_experts_per_tok to null"),
        (V3, {"num_nextn_predict_layers": "1"}, 'num_nextn_predict_layers to "1"'),
        (V2, {"topk_method": "group_limited_greedy", "n_group": None}, "n_group"),
        (V3, {"n_group": None}, "n_group to null"),
    ],
)
def test_what_would_compute_something_else_is_an_error_that_names_it(tmp_path, family, changes, named):
    original(**family | {"num_hidden_layers": 1}).save_pretrained(tmp_path)
    published(tmp_path, **changes)
    with pytest.raises(PretrainedError, match=re.escape(named)):
        load_pretrained(tmp_path)


# Sizes


@pytest.mark.parametrize(
    "name, Model, parameters",
    [
        ("deepseek-v2-lite", DeepseekV2, 15_706_484_224),
        ("deepseek-v2", DeepseekV2, 235_741_434_880),
        ("deepseek-v3", DeepseekV3, 671_026_404_352),
    ],
)
def test_published_sizes_have_the_published_number_of_parameters(name, Model, parameters):
    with torch.device("meta"):
        model = Model(SIZES[Model][name])
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_the_config_as_published_is_that_of_sizes():
    yarn = dict(beta_fast=32, beta_slow=1, factor=40, mscale=1.0, mscale_all_dim=1.0, type="yarn")
    config = dict(
        **dict(architectures=["DeepseekV3ForCausalLM"], attention_bias=False, attention_dropout=0.0, ep_size=1),
        **dict(auto_map={"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, aux_loss_alpha=0.001, seq_aux=True),
        **dict(bos_token_id=0, eos_token_id=1, first_k_dense_replace=3, hidden_act="silu", hidden_size=7168),
        **dict(initializer_range=0.02, intermediate_size=18432, kv_lora_rank=512, max_position_embeddings=163840),
        **dict(model_type="deepseek_v3", moe_intermediate_size=2048, moe_layer_freq=1, n_group=8, n_routed_experts=256),
        **dict(n_shared_experts=1, norm_topk_prob=True, num_attention_heads=128, num_experts_per_tok=8),
        **dict(num_hidden_layers=61, num_key_value_heads=128, num_nextn_predict_layers=1, pretraining_tp=1),
        **dict(q_lora_rank=1536, qk_nope_head_dim=128, qk_rope_head_dim=64, rms_norm_eps=1e-06, rope_theta=10000),
        **dict(rope_scaling=yarn | {"original_max_position_embeddings": 4096}, routed_scaling_factor=2.5),
        **dict(scoring_func="sigmoid", tie_word_embeddings=False, topk_group=4, topk_method="noaux_tc"),
        **dict(
            torch_dtype="bfloat16", transformers_version="4.33.1", use_cache=True, v_head_dim=128, vocab_size=129280
        ),
    )
    assert DeepseekV3.Config(**read_config(PUBLISHED[DeepseekV3], config)) == SIZES[DeepseekV3]["deepseek-v3"]


def test_the_published_model_has_the_experts_and_the_scale_of_its_report():
    config = SIZES[DeepseekV3]["deepseek-v3"]
    assert config.attention_scale == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)
    with torch.device("meta"):
        model = DeepseekV3(config)
    assert active_parameters(model) / 1e9 == pytest.approx(37, abs=1)
    cached = sum(x[0, 0].numel() for x in model.make_cache(1, 1).layers[0].values() if x.is_floating_point())
    assert cached == 512 + 64


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim = 7"),
        ({"q_lora_rank": 0}, "q_lora_rank = 0"),
        ({"n_dense_layers": -1}, "n_dense_layers = -1"),
        ({"n_mtp": -1}, "n_mtp = -1"),
        ({"n_mtp": 512}, "n_mtp = 512"),
        ({"n_groups": 16, "top_k_groups": 8}, "n_groups = 16"),
        ({"n_groups": 5}, "n_groups = 5"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
    ],
)
def test_impossible_settings_are_named(changes, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        DeepseekV3.Config(**changes)


# Multi-token prediction


def make_trained(n_mtp, **overrides):
    """In training mode without a change of bias, so that a loss can be computed twice."""
    return tiny_model("deepseek_v3", n_mtp=n_mtp, mtp_loss_coef=0.7, **overrides).train()


def test_the_loss_of_further_tokens_is_the_reports_formula_written_as_loops(tokens):
    model, text = make_trained(2), tokens[:2, :9]

    def normed(vector, norm):
        return vector / (vector.square().mean() + norm.eps).sqrt() * norm.weight

    embedding, depths = model.tok_embed.weight, []
    hidden = [[normed(h, model.norm) for h in row] for row in model.hidden(text[:, :-1])]
    for k, module in enumerate(model.mtp, 1):
        nats, deeper = [], []
        for row, known in zip(text, hidden, strict=True):
            inputs = [
                module.in_proj.weight
                @ torch.cat([normed(embedding[row[i + k]], module.embed_norm), normed(known[i], module.hidden_norm)])
                for i in range(len(known) - 1)
            ]
            deeper.append([])
            for i in range(len(inputs)):  # each position from the ones before it alone
                x = module.block(torch.stack(inputs[: i + 1])[None], torch.arange(i + 1))[0, -1]
                deeper[-1].append(normed(x, module.norm))
                nats.append(-(embedding @ deeper[-1][-1]).log_softmax(0)[row[i + k + 1]])
        depths.append(torch.stack(nats).mean())
        hidden = deeper
    loss, parts_of_it = model.loss(text)
    torch.testing.assert_close(parts_of_it["aux"], 0.7 * (depths[0] + depths[1]) / 2, rtol=1e-6, atol=0)
    torch.testing.assert_close(loss, parts_of_it["ce"] + parts_of_it["aux"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v3_2"])
def test_a_module_without_a_token_to_predict_has_no_loss(name, tokens):
    """Of two modules, the second has none in a window of 3 tokens, and the first has none in one of 2 either."""
    two, one, none = (tiny_model(name, n_mtp=n) for n in (2, 1, 0))
    for fewer in (one, none):
        fewer.load_state_dict({name: x for name, x in two.state_dict().items() if name in fewer.state_dict()})
    for length, fewer in ((3, one), (2, none)):
        loss, parts = two.train().loss(tokens[:, :length])
        expected, expected_parts = fewer.train().loss(tokens[:, :length])
        torch.testing.assert_close((loss, parts), (expected, expected_parts), rtol=1e-12, atol=0)
        loss.backward()


def test_prediction_modules_are_those_of_transformers(tokens):
    modeling_layers = pytest.importorskip("transformers.modeling_layers")
    oracle = original(**V3, num_mtp_layers=2)
    theirs = modeling_layers.MtpModel(oracle, 2).eval()
    redraw(theirs.layers)
    ours = [PredictionModule(36, block(oracle.config), lambda: RMSNorm(36, 1e-3)).eval() for _ in theirs.layers]
    with torch.no_grad():
        h = expected = oracle.model(tokens).last_hidden_state
        for k, (module, layer) in enumerate(zip(ours, theirs.layers, strict=True)):
            copy_module(module, layer)
            following = tokens[:, k + 1 :]
            h, expected = h[:, :-1], expected[:, :-1]
            positions = torch.arange(following.shape[1])[None]
            expected = theirs.forward_layer(k, expected, positions, None, input_ids=following)
            h = module(h, oracle.model.embed_tokens(following))
            torch.testing.assert_close(h, expected, rtol=0, atol=2e-5)


def block(config):
    """A sparse block of ours for a config of theirs."""
    ours = read_config(PUBLISHED[DeepseekV3], config.to_dict())
    return DeepseekV3(DeepseekV3.Config(**ours)).blocks[-1]


def copy_module(ours, theirs):
    """Their module's weights into ours, the block's by the name table."""
    state = theirs.state_dict()
    names = {"enorm": "embed_norm", "hnorm": "hidden_norm", "eh_proj": "in_proj", "post_norm": "norm"}
    for name, our_name in names.items():
        ours.get_submodule(our_name).weight.copy_(state[name + ".weight"])
    inner = {name.replace("mtp_block.", "model.layers.0."): x for name, x in state.items() if "mtp_block." in name}
    targets = {f"blocks.0.{name}": x for name, x in ours.block.state_dict().items()}
    for step in plan(PUBLISHED[DeepseekV3].names, targets, inner):
        values = step.operation.load([inner[name] for name in step.theirs])
        for target, value in zip(parts(targets, step), values, strict=True):
            target.copy_(value)


@torch.no_grad()
def pass_through(module, n_embedded, n_hidden):
    """Let a prediction module hand on a multiple of the embedding and one of the hidden state, and nothing else."""
    eye = torch.eye(module.in_proj.out_features, dtype=module.in_proj.weight.dtype)
    module.in_proj.weight.copy_(torch.cat([n_embedded * eye, n_hidden * eye], 1))
    for name, parameter in module.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            parameter.zero_()
        elif "norm" in name:
            parameter.fill_(1.0)


def test_a_module_that_changes_nothing_scores_the_models_own_prediction_one_token_further(tokens):
    model = make_trained(1)
    with torch.no_grad():
        model.norm.weight.fill_(1.0)
    pass_through(model.mtp[0], 0.0, 1.0)
    logits = model(tokens[:, :-1])[:, :-1]
    expected = 0.7 * F.cross_entropy(logits.flatten(0, 1), tokens[:, 2:].flatten())
    torch.testing.assert_close(model.loss(tokens)[1]["aux"], expected, rtol=1e-4, atol=0)


def test_a_module_that_reads_the_embedding_only_knows_the_token_before_its_target(tokens):
    model = make_trained(1)
    pass_through(model.mtp[0], 1.0, 0.0)
    x = model.tok_embed(tokens[:, 1:-1])
    logits = F.rms_norm(x, x.shape[-1:], eps=1e-5) @ model.tok_embed.weight.T
    expected = 0.7 * F.cross_entropy(logits.flatten(0, 1), tokens[:, 2:].flatten())
    torch.testing.assert_close(model.loss(tokens)[1]["aux"], expected, rtol=1e-3, atol=0)


def test_prediction_modules_train_the_model_and_leave_everything_else_alone(tokens, tmp_path):
    model, plain = make_trained(1), make_trained(0)
    plain.load_state_dict({name: x for name, x in model.state_dict().items() if not name.startswith("mtp.")})
    losses = {m: m.loss(tokens) for m in (model, plain)}
    assert losses[plain][1]["aux"] == 0 < losses[model][1]["aux"]
    assert torch.equal(losses[model][1]["ce"], losses[plain][1]["ce"])
    for loss, _ in losses.values():
        loss.backward()
    first = [m.blocks[0].mixer.o_proj.weight.grad for m in (model, plain)]
    assert not torch.allclose(*first)
    model.eval(), plain.eval()
    assert torch.equal(model(tokens), plain(tokens))
    assert model.loss(tokens)[0] == plain.loss(tokens)[0]
    export_pretrained(model, tmp_path / "out")
    again = load_pretrained(tmp_path / "out")
    assert again.config == replace(model.config, n_mtp=0, mtp_loss_coef=0.3)
    assert torch.equal(again(tokens), model(tokens))


def test_the_experts_of_a_prediction_module_are_balanced_too(tokens):
    model = make_trained(1, n_dense_layers=1)
    bias = model.mtp[0].block.ffn.router.expert_bias.clone()
    model.loss(tokens)
    model.after_step()
    moved = (model.mtp[0].block.ffn.router.expert_bias - bias).abs()
    assert moved.max() == pytest.approx(0.001) and len([n for n in model.metrics() if "load" in n]) == 2


def test_v2_balances_by_a_loss_and_its_weights_are_the_probabilities_themselves(tokens):
    model = tiny_model("deepseek_v2", aux_loss_coef=0.5, routed_scaling_factor=3.0).train()
    assert model.loss(tokens)[1]["aux"] >= 0.5 * 0.9
    router, x = model.blocks[1].ffn.router, torch.randn(5, 7, 128).double()
    experts, weights = router(x)
    probabilities = (x @ router.weight.T).softmax(-1)
    torch.testing.assert_close(weights, 3 * probabilities.gather(-1, experts))
