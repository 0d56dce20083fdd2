"""DeepSeek Sparse Attention: transformers' model, its objective as loops, and what learns from what."""

import copy
import math

import pytest
import torch
from conftest import redraw, tiny_model
from parity import assert_same_continuation, assert_same_gradients, assert_same_logits, assert_survives_export, twins
from safetensors.torch import load_file
from test_attention import step_by_step
from training import RUN, at_step, command_line, evaluations, script, write_corpus

from llm.modules.attention.latent import LatentAttention
from llm.modules.position_encoding.rope import RoPE
from llm.modules.sparse import indexer
from llm.modules.sparse.indexer import Indexer, SparseLatentAttention
from llm.training import loop
from llm.training.checkpoint import newest_good
from llm.training.run_directory import RunDirectory

T = 40
POSITIONS = torch.arange(T)
SHAPE = dict(
    **dict(vocab_size=97, hidden_size=36, num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=3),
    **dict(intermediate_size=40, moe_intermediate_size=16, n_routed_experts=8, num_experts_per_tok=3),
    **dict(n_shared_experts=2, q_lora_rank=20, kv_lora_rank=24, qk_nope_head_dim=10, qk_rope_head_dim=12),
    **dict(v_head_dim=14, max_position_embeddings=64, first_k_dense_replace=1, n_group=4, topk_group=2),
    **dict(index_n_heads=8, index_head_dim=16, index_topk=6, rms_norm_eps=1e-3),
)
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
WIDTHS = dict(kv_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5, q_lora_rank=10)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"index_topk": 64},
        {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
        {"norm_topk_prob": False},
    ],
)
def test_logits_generation_export_and_gradients_are_those_of_transformers(tmp_path, config):
    theirs, ours = twins(tmp_path, "DeepseekV32ForCausalLM", **{**SHAPE, **config})
    assert_same_logits(theirs, ours)
    assert_same_continuation(theirs, ours)
    assert_survives_export(theirs, ours, tmp_path)
    for parameter in theirs.parameters():  # the choice has no gradient: theirs leave the indexer without one
        parameter.register_hook(lambda grad: grad)
        parameter.grad = torch.zeros_like(parameter)
    for name, parameter in ours.named_parameters():
        parameter.grad = torch.zeros_like(parameter) if ".indexer." in name else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(ours), "named_parameters", learned_by_the_cross_entropy(type(ours).named_parameters))
        assert_same_gradients(theirs, ours, tmp_path)


def learned_by_the_cross_entropy(named_parameters):
    return lambda model, *args, **options: (
        (name, p) for name, p in named_parameters(model, *args, **options) if ".indexer." not in name
    )


score = Indexer.forward


def sparse_layer(top_k, Mixer=SparseLatentAttention, **options):
    torch.manual_seed(0)
    options = dict(d_model=24, n_heads=3, rope=RoPE(4, interleaved=True), **WIDTHS, **options)
    if Mixer is SparseLatentAttention:
        indexer = Indexer(d_model=24, q_lora_rank=10, n_heads=8, head_dim=6, rope=RoPE(6, rotary_dim=4))
        options |= dict(indexer=indexer, index_top_k=top_k, index_loss_coef=0.7)
    layer = Mixer(**options).double().eval()
    redraw(layer)
    return layer, torch.randn(2, T, 24, dtype=torch.float64)


@torch.no_grad()
def by_loops(layer, x, top_k):
    """Output, and the indexer's loss without its weight."""
    q_nope, q_rope = layer.queries(x, POSITIONS)
    latent, k_rope = layer.compress(x, POSITIONS)
    k_nope, v = layer.kv_b_proj(latent).unflatten(-1, (3, -1)).split(layer.expanded_split, -1)
    q_latent, indexer = layer.q_a_norm(layer.q_a_proj(x)), layer.indexer
    q_i = indexer.rope(indexer.q_proj(q_latent).unflatten(-1, (8, -1)), POSITIONS)
    k_i, w = indexer.keys(x, POSITIONS), indexer.weights_proj(x)
    heads, losses = torch.zeros(2, T, 3, 5, dtype=x.dtype), []
    for b in range(2):
        for t in range(T):
            score = [
                sum(w[b, t, j] * torch.relu(q_i[b, t, j] @ k_i[b, s]) for j in range(8)) / math.sqrt(8 * 6)
                for s in range(t + 1)
            ]
            chosen = sorted(range(t + 1), key=lambda s: -score[s])[:top_k]
            p = torch.zeros(len(chosen), dtype=x.dtype)
            for h in range(3):
                logits = torch.stack(
                    [q_nope[b, t, h] @ k_nope[b, s, h] + q_rope[b, t, h] @ k_rope[b, s] for s in chosen]
                )
                weights = (logits / math.sqrt(10)).softmax(0)
                heads[b, t, h] = weights @ v[b, chosen, h]
                p += weights / 3
            log_q = torch.stack([score[s] for s in chosen]).log_softmax(0)
            losses.append((p * (p.log() - log_q)).sum())
    return layer.o_proj(heads.flatten(2)), torch.stack(losses).mean()


@pytest.mark.parametrize("top_k", [1, 7, 40])
def test_output_and_objective_are_the_papers_written_as_loops(top_k):
    layer, x = sparse_layer(top_k)
    expected, divergence = by_loops(layer, x, top_k)
    torch.testing.assert_close(layer.train()(x, POSITIONS), expected, rtol=0, atol=1e-6)  # RoPE's angles are fp32
    torch.testing.assert_close(layer.pop_loss(), 0.7 * divergence, rtol=0, atol=1e-6)
    assert layer.pop_loss() is None


def test_choosing_everything_and_the_warm_up_are_dense_attention():
    full, x = sparse_layer(0, LatentAttention)
    for options in ({"top_k": T}, {"top_k": 3, "dense": True}):
        layer, _ = sparse_layer(**options)
        full.load_state_dict({n: p for n, p in layer.state_dict().items() if "indexer" not in n})
        torch.testing.assert_close(layer(x, POSITIONS), full(x, POSITIONS), rtol=0, atol=1e-10)
    layer.train()(x, POSITIONS)
    _, divergence = by_loops(layer, x, T)  # the warm-up's loss is over all earlier tokens
    torch.testing.assert_close(layer.pop_loss(), 0.7 * divergence, rtol=0, atol=1e-6)


@pytest.mark.parametrize("parts", [[1] * T, [T], [11, 1, 1, 20, 1, 6]])
@pytest.mark.parametrize("padding", [0, 7])
def test_a_cache_in_any_parts_with_or_without_padding_equals_recomputing(padding, parts):
    layer, x = sparse_layer(7)
    ours = step_by_step(layer, x, parts, padding=torch.tensor([0, padding]))
    torch.testing.assert_close(ours[0], layer(x[:1], POSITIONS)[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(
        ours[1, padding:], layer(x[1:, padding:], POSITIONS[: T - padding])[0], rtol=0, atol=1e-6
    )


def test_the_indexer_learns_from_its_loss_only_and_the_model_from_the_rest_only():
    model = tiny_model("deepseek_v3_2").train()
    windows = torch.randint(97, (2, 33), generator=torch.Generator().manual_seed(1))
    mixers = [block.mixer for block in model.blocks]
    x = model.hidden(windows[:, :-1])
    torch.stack([mixer.pop_loss() for mixer in mixers]).sum().backward(retain_graph=True)
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert with_gradient and all(".indexer." in name for name in with_gradient)
    assert with_gradient == {name for name, _ in model.named_parameters() if ".indexer." in name and "mtp" not in name}
    model.zero_grad()
    model.unembed(x).square().sum().backward()
    assert not any(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if ".indexer." in n)


@pytest.mark.parametrize("dense", [False, True])
def test_a_long_text_is_scored_in_parts_with_the_same_result_and_gradients(monkeypatch, dense):
    found = []
    for queries in (T, 7):
        monkeypatch.setattr(indexer, "QUERIES", queries)
        layer, x = sparse_layer(6, dense=dense)
        y = layer.train()(x.requires_grad_(), POSITIONS)
        (y.square().sum() + layer.pop_loss()).backward()
        found.append([y, x.grad, *(p.grad for p in layer.parameters())])
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("whole", [True, False])
def test_of_one_text_the_keys_after_a_part_are_not_scored(monkeypatch, whole):
    monkeypatch.setattr(indexer, "QUERIES", 8)
    (layer, x), scored = sparse_layer(6), []
    monkeypatch.setattr(
        Indexer, "forward", lambda self, *inputs: scored.append(inputs[2].shape[1]) or score(self, *inputs)
    )
    cache = None if whole else layer.make_cache(len(x), T)
    layer(x, POSITIONS if whole else POSITIONS.expand(len(x), -1), cache)
    assert scored == [8, 16, 24, 32, 40] if whole else [cache["pos"].shape[1]] * 5


def test_scores_are_in_fp32_also_in_bf16_training_and_a_recomputed_loss_does_not_stay():
    layer, x = sparse_layer(6)
    layer, x = layer.float().train(), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        q_latent = layer.q_a_norm(layer.q_a_proj(x))
        keys = layer.indexer.keys(x, POSITIONS)
        assert layer.indexer(x, q_latent, keys, POSITIONS).dtype == torch.float32
        layer(x, POSITIONS)
    assert layer.index_loss.dtype == torch.float32
    layer.after_step()
    copy.deepcopy(layer)


STAGES = {
    "dense": "--steps 2 --model.index-top-k 32 --model.index-loss-coef 0",
    "warmup": "--steps 4 --model.index-top-k 4 --model.index-warmup",
    "sparse": "--steps 6 --model.index-top-k 4",
}
SIZES = {
    **{"--model.d-model": 32, "--model.n-layers": 2, "--model.n-heads": 2, "--model.max-seq-len": 32},
    **{"--model.q-lora-rank": 16, "--model.kv-lora-rank": 16, "--model.d-ff": 48, "--model.d-expert": 16},
    **{"--model.n-experts": 4, "--model.top-k": 2, "--model.n-groups": 1, "--model.top-k-groups": 1},
    **{"--model.index-n-heads": 2, "--model.index-head-dim": 16},
}


def run_stage(data, folder, stage, *flags):
    """Returns the checkpoint that the stage leaves."""
    settings = {**RUN, **SIZES, "--data": data, "--out": folder / stage, "--weight-decay": 0.5}
    script("train_deepseek_v3_2").main(command_line(settings, *STAGES[stage].split(), *flags))
    return newest_good(folder / stage / "checkpoints")


@pytest.mark.filterwarnings("ignore:Unable to enable fault handler")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_commands_of_the_three_stages_train_what_the_paper_says(tmp_path, monkeypatch, capsys, optimizer):
    """All, then the indexers alone, then all: each stage begins with the weights that the one before has left."""
    monkeypatch.setattr(RunDirectory, "plot", lambda self: None)
    data, begun = write_corpus(tmp_path), {}
    for step in (3, 5):
        at_step(monkeypatch, step, lambda model, step=step: begun.update({step: copy.deepcopy(model.state_dict())}))
    dense = run_stage(data, tmp_path, "dense", "--optimizer", optimizer)
    warm = run_stage(data, tmp_path, "warmup", "--optimizer", optimizer, "--resume", dense)
    sparse = run_stage(data, tmp_path, "sparse", "--optimizer", optimizer, "--resume", warm)
    one, two, three = (load_file(folder / "model.safetensors") for folder in (dense, warm, sparse))
    assert all(torch.equal(begun[3][name], one[name]) and torch.equal(begun[5][name], two[name]) for name in one)
    assert {n for n in one if not torch.equal(one[n], two[n])} == {n for n in one if ".indexer." in n}
    assert {n for n in two if torch.equal(two[n], three[n])} <= {n for n in two if n.endswith("expert_bias")}
    (loss,) = {point["eval_loss"] for point in evaluations(tmp_path / "warmup").values()}
    assert loss == evaluations(tmp_path / "dense")[2]["eval_loss"]  # attention is still dense
    with pytest.raises(SystemExit):
        run_stage(data, tmp_path, "sparse", "--optimizer", optimizer, "--resume", warm, "--out", tmp_path / "warmup")
    assert "model.index_warmup: saved true, given false" in capsys.readouterr().err  # a run directory is of one stage


@pytest.mark.filterwarnings("ignore:Unable to enable fault handler")
def test_a_sharded_warm_up_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "check_shard", lambda config: None)  # as if torchrun had started this process
    with pytest.raises(SystemExit):
        run_stage(write_corpus(tmp_path), tmp_path, "warmup", "--shard")
    assert "frozen weights" in (said := capsys.readouterr().err) and "Leave out --shard" in said
    assert not (tmp_path / "warmup").exists()


def test_a_warm_up_in_which_nothing_would_learn_is_refused():
    with pytest.raises(ValueError, match=r"index_loss_coef = 0 .*--model.index-loss-coef"):
        tiny_model("deepseek_v3_2", index_warmup=True, index_loss_coef=0)
    with pytest.raises(ValueError, match=r"index_loss_coef = -1.0 .*--model.index-loss-coef"):
        tiny_model("deepseek_v3_2", index_loss_coef=-1.0)


def test_what_the_indexer_needs_is_demanded():
    with pytest.raises(ValueError, match="q_lora_rank = None"):
        tiny_model("deepseek_v3_2", q_lora_rank=None)
    with pytest.raises(ValueError, match="index_head_dim = 8"):
        tiny_model("deepseek_v3_2", index_head_dim=8)
