"""Models that fill in hidden tokens: what each one promises in place of causality, the bound, and writing."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CAUSAL, DENOISERS, VOCABULARY, tiny_model
from parity import draw_tokens, original
from torch.utils.flop_counter import FlopCounterMode

from llm.analysis.accounting import describe
from llm.analysis.compare import bounded
from llm.generate.sampling import Sampler, generate_tokens, greedy
from llm.hub.export import export_pretrained
from llm.hub.load import load_pretrained
from llm.hub.maps import PUBLISHED, SIZES
from llm.hub.tables import PretrainedError, read_config
from llm.models import MODELS
from llm.models.case_studies.dream import Dream
from llm.models.case_studies.llada import LLaDA
from llm.models.case_studies.sdar import SDAR
from llm.models.denoiser import Denoiser
from llm.modules import masks
from llm.modules.cache import STEP
from llm.modules.diffusion.hiding import hidden_counts, hide
from llm.modules.diffusion.unmasking import Unmasking, fill_in
from llm.modules.kernels.cross_entropy import explicit_cross_entropy, linear_cross_entropy
from llm.modules.masks import BlockCausal
from llm.training.device import Machine
from llm.training.distributed import Ranks
from llm.training.evaluate import EvalSet, evaluate, in_words

every_denoiser = pytest.mark.parametrize("name", DENOISERS)
BLOCKS = [name for name in DENOISERS if hasattr(MODELS[name].Config, "block_size")]
WHOLE = [name for name in DENOISERS if name not in BLOCKS]
MACHINE = Machine(torch.device("cpu"), bf16=False, compile=False)


def sampler_of(rows: int, temperature: float = 1.0, seed: int = 0) -> Sampler:
    return Sampler(tuple(torch.Generator().manual_seed(seed + row) for row in range(rows)), temperature)


def write(model, prompts, n_tokens=21, sampler=greedy, padding=0):
    """(B, n_tokens): what the model writes, its blocks joined."""
    return torch.cat(list(model.generate(prompts, n_tokens, sampler, padding)), 1)


@torch.no_grad()
def log_p(model, tokens, hidden):
    """(B, T) log-probability of each token where `hidden` are hidden, by the path that the loss takes."""
    x = model.denoise(tokens.masked_fill(hidden, model.mask_token), tokens)
    return model.unembed(x).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


# What stands in for causality


def test_there_are_models_of_both_kinds_and_the_property_says_which():
    assert {"masked_diffusion", "block_diffusion", "llada"} <= set(DENOISERS) and "baseline" in CAUSAL
    assert all(issubclass(MODELS[name], Denoiser) for name in DENOISERS)


@every_denoiser
def test_a_hidden_token_does_not_leak_and_a_visible_one_is_read(name, tokens):
    """Another token in a hidden place changes no prediction of a hidden token of its own block or an earlier one."""
    model = tiny_model(name)
    hidden = torch.zeros_like(tokens, dtype=torch.bool)
    hidden[:, 20:] = True
    changed = tokens.clone()
    changed[:, 20:] = (tokens[:, 20:] + 1) % VOCABULARY
    with torch.no_grad():
        one, other = (model.denoise(t.masked_fill(hidden, model.mask_token), t) for t in (tokens, changed))
        first = 20 + model.group_size(24) if name in BLOCKS else 24  # the next block may read what this one became
        assert torch.equal(one[:, :first], other[:, :first])
        changed = tokens.clone()
        changed[:, 3] = (tokens[:, 3] + 1) % VOCABULARY
        read = model.denoise(changed.masked_fill(hidden, model.mask_token), changed)
    assert not torch.isclose(one[:, 20:], read[:, 20:]).all(-1).any()


@pytest.mark.parametrize("name", WHOLE)
def test_a_hidden_token_is_predicted_from_both_sides(name, tokens):
    model = tiny_model(name)
    hidden = torch.arange(24) == 12
    for place in (2, 22):
        changed = tokens.clone()
        changed[:, place] = (tokens[:, place] + 1) % VOCABULARY
        one, other = (log_p(model, t, hidden.expand_as(t))[:, 12] for t in (tokens, changed))
        assert ((one - other).abs() > 1e-6).all()


@pytest.mark.parametrize("name", WHOLE)
def test_a_padded_text_gives_what_it_gives_alone(name, tokens):
    model = tiny_model(name)
    padding = torch.tensor([0, 5, 11])
    together = model(tokens, model.make_cache(3, 24, padding))
    for row, n in enumerate(padding):
        torch.testing.assert_close(together[row, n:], model(tokens[row : row + 1, n:])[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", BLOCKS)
def test_whole_blocks_through_the_cache_are_what_they_are_without_it(name, tokens):
    model = tiny_model(name, block_size=4)
    cache = model.make_cache(3, 24)
    cached = torch.cat([model(part, cache) for part in tokens.split([8, 4, 12], 1)], 1)
    torch.testing.assert_close(cached, model(tokens), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", BLOCKS)
def test_later_blocks_do_not_reach_earlier_ones_and_order_inside_a_block_does(name, tokens):
    model = tiny_model(name, block_size=4)
    changed = tokens.clone()
    changed[:, 10] = (tokens[:, 10] + 1) % VOCABULARY
    same = torch.isclose(model(tokens), model(changed), rtol=0, atol=1e-12).all(-1)
    assert same[:, :8].all() and not same[:, 8:].any()


@pytest.mark.parametrize("name", BLOCKS)
def test_both_copies_in_one_pass_are_each_block_after_the_clean_ones(name, tokens):
    """What one pass over two copies says about a block, writing computes by itself: cache, then the noisy block."""
    model = tiny_model(name, block_size=4)
    hidden = torch.rand(3, 24, generator=torch.Generator().manual_seed(3)) < 0.5
    together = log_p(model, tokens, hidden)
    for first in range(0, 24, 4):
        cache = model.make_cache(3, 24)
        if first:
            model(tokens[:, :first], cache)
        noisy = tokens[:, first : first + 4].masked_fill(hidden[:, first : first + 4], model.mask_token)
        alone = model(noisy, cache).log_softmax(-1).gather(-1, tokens[:, first : first + 4, None])[..., 0]
        torch.testing.assert_close(together[:, first : first + 4], alone, rtol=0, atol=1e-10)


def test_the_mask_of_two_copies_is_the_papers():
    """BD3-LM, section 3.1: block-diagonal, offset block-causal and block-causal, written out by hand."""
    n, size = 6, 2
    p = torch.arange(n)
    positions = torch.cat([p + masks.NOISY, p])
    shown = masks.visibility(BlockCausal(size), positions, positions)
    block = p // size
    own = block[:, None] == block
    earlier = block[:, None] > block
    expected = torch.cat([torch.cat([own, earlier], 1), torch.cat([torch.zeros(n, n).bool(), own | earlier], 1)])
    assert torch.equal(shown, expected)


@pytest.mark.parametrize("name", BLOCKS)
def test_the_order_of_blocks_in_memory_is_nothing_their_positions_are_all(name, tokens):
    """Both copies with their blocks shuffled: each token gets what it gets in order."""
    model = tiny_model(name, block_size=4)
    p = torch.arange(24)
    noisy = tokens.masked_fill(p % 3 == 0, model.mask_token)
    x = torch.cat([model.embed(noisy, p), model.embed(tokens, p)], 1)
    positions, whole = torch.cat([p + masks.NOISY, p]), torch.cat([noisy, tokens], 1)
    shuffled = torch.randperm(12, generator=torch.Generator().manual_seed(6))
    places = (shuffled[:, None] * 4 + torch.arange(4)).flatten()
    with torch.no_grad():
        in_order = model.run_blocks(x, positions[None], [None] * 2, whole)
        found = model.run_blocks(x[:, places], positions[places][None], [None] * 2, whole[:, places])
    torch.testing.assert_close(found, in_order[:, places], rtol=0, atol=1e-10)


# What is hidden


@pytest.mark.parametrize(("shape", "size"), [((3, 24), 24), ((5, 24), 4), ((1, 8), 8), ((2, 6), 1)])
def test_each_group_hides_as_many_tokens_as_its_weights_say(shape, size):
    weight = hide(torch.zeros(shape), size)
    hidden = weight > 0
    k = hidden.view(-1, size).sum(-1)
    assert k.min() >= 1 and k.max() <= size
    assert torch.equal(weight.view(-1, size), hidden.view(-1, size) * size / k[:, None])
    assert weight.mean().item() == pytest.approx(1)


def test_counts_are_uniform_and_evenly_spread_over_a_batch():
    assert sorted(hidden_counts(12, 4).tolist()) == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    torch.manual_seed(0)
    one = torch.stack([hidden_counts(3, 5)[1] for _ in range(4000)]).bincount(minlength=6)[1:] / 4000
    torch.testing.assert_close(one, torch.full((5,), 0.2), rtol=0, atol=0.03)


def test_every_set_of_hidden_tokens_is_as_likely_as_every_other_of_its_size():
    torch.manual_seed(0)
    hidden = hide(torch.zeros(24_000, 4), 4) > 0
    seen = (hidden * 2 ** torch.arange(4)).sum(1).bincount(minlength=16) / 24_000
    expected = [0.0] + [1 / 4 / math.comb(4, n.bit_count()) for n in range(1, 16)]
    torch.testing.assert_close(seen, torch.tensor(expected), rtol=0, atol=0.01)


def test_a_text_that_is_no_whole_number_of_blocks_is_refused():
    with pytest.raises(ValueError, match=r"23 tokens.*blocks of 4.*--model.block-size"):
        hide(torch.zeros(2, 23), 4)
    with pytest.raises(ValueError, match=r"block_size = 5 does not divide max_seq_len = 64"):
        tiny_model("block_diffusion", block_size=5)


def test_the_fused_loss_weighs_rows_as_the_explicit_one_does():
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 8, generator=draw, dtype=torch.float64) for n in (70, 11))
    targets, factors = torch.randint(11, (70,), generator=draw), torch.rand(70, generator=draw)
    results = []
    for loss in (linear_cross_entropy, explicit_cross_entropy):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        value = loss(*leaves, targets, factors)
        results.append([value.detach(), *torch.autograd.grad(3 * value, leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-6, atol=1e-8)


# The bound


TINY = {"vocab_size": 3, "max_seq_len": 4, "d_model": 8, "n_heads": 2, "d_ff": 16}


def tiniest(name, **more):
    return tiny_model(name, **TINY, **more)


def log_p_in_order(model, text, order):
    """log p of texts (B, T), written token by token in this order, by the chain rule."""
    total = 0
    for done in range(len(order)):
        hidden = torch.ones(len(order), dtype=torch.bool)
        hidden[list(order[:done])] = False
        total = total + log_p(model, text, hidden.expand_as(text))[:, order[done]]
    return total


def orders(model, n_tokens):
    """Every order in which a model may write: any inside a group, groups from left to right."""
    size = model.group_size(n_tokens)
    groups = [range(first, first + size) for first in range(0, n_tokens, size)]
    each = itertools.product(*(itertools.permutations(group) for group in groups))
    return [tuple(itertools.chain(*order)) for order in each]


SMALLEST = [
    ("masked_diffusion", {}),
    ("block_diffusion", {"block_size": 2}),
    ("block_diffusion", {"block_size": 1}),
    ("block_diffusion", {"block_size": 4}),
    ("autoregressive_twin", {}),
]


@pytest.mark.parametrize(("name", "more"), SMALLEST)
def test_the_loss_is_the_mean_over_all_orders_and_bounds_the_exact_likelihood(name, more):
    """All 81 texts of four tokens, by enumeration: the estimate's mean is the bound, the bound is above -log p, and p
    is a distribution."""
    model = tiniest(name, **more)
    texts = torch.tensor(list(itertools.product(range(3), repeat=4)))
    by_order = torch.stack([log_p_in_order(model, texts, order) for order in orders(model, 4)])
    exact = by_order.logsumexp(0) - math.log(len(by_order))  # log of the mean over orders of p
    assert exact.exp().sum().item() == pytest.approx(1, abs=1e-9)
    bound = -by_order.mean(0) / 4
    assert (bound >= -exact / 4 - 1e-9).all()
    torch.manual_seed(0)
    with torch.no_grad():
        windows = torch.cat([texts[:, :1], texts], 1)
        estimates = torch.stack([model.loss(windows)[1]["ce"] for _ in range(400)])
    error = estimates.std().item() / 20
    assert error < 0.01
    assert estimates.mean().item() == pytest.approx(bound.mean().item(), abs=max(4 * error, 1e-6))
    if model.group_size(4) == 1:
        torch.testing.assert_close(bound, -exact / 4)
        assert error < 1e-6
    else:
        assert (bound > -exact / 4 + 1e-4).any()


def test_blocks_of_one_token_have_the_autoregressive_loss_exactly(tokens):
    """Token by token: -log p of each, given those before it and a hidden token in its place."""
    model = tiny_model("block_diffusion", block_size=1)
    text = tokens[:, 1:]
    nats = []
    for t in range(text.shape[1]):
        with_hidden = torch.cat([text[:, :t], torch.full_like(text[:, :1], model.mask_token)], 1)
        nats.append(-model(with_hidden)[:, -1].log_softmax(-1).gather(-1, text[:, t, None])[:, 0])
    torch.testing.assert_close(model.loss(tokens)[1]["ce"].double(), torch.stack(nats).mean(), rtol=0, atol=1e-6)


def test_one_block_for_the_whole_text_is_masked_diffusion(tokens):
    whole, blocks = tiny_model("masked_diffusion"), tiny_model("block_diffusion", block_size=8)
    blocks.load_state_dict(whole.state_dict())
    losses = []
    for model in (whole, blocks):
        torch.manual_seed(0)
        losses.append(model.loss(tokens[:, :9])[0].item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-9)


def test_the_twin_is_block_diffusion_with_blocks_of_one_token():
    twin, blocks = MODELS["autoregressive_twin"], MODELS["block_diffusion"]
    names = [[name for name, _ in tiny_model(n).named_parameters()] for n in ("autoregressive_twin", "block_diffusion")]
    assert names[0] == names[1]
    assert replace(blocks.Config(), block_size=1) != twin.Config() and twin.Config().block_size == 1


@every_denoiser
def test_the_seed_decides_what_is_hidden(name, tokens):
    model = tiny_model(name)

    def loss(seed):
        torch.manual_seed(seed)
        return model.loss(torch.cat([tokens, tokens[:, :1]], 1))[0].item()

    assert loss(3) == loss(3)
    assert model.group_size(24) == 1 or loss(3) != loss(4)


@every_denoiser
def test_it_can_learn_one_text_by_heart(name):
    """Every second token from the others. With all of them hidden, places would be alike to a model that knows only
    distances, and so its loss does not go to 0."""
    Model = MODELS[name]
    torch.manual_seed(0)
    sizes = {**Model.Config.small, "vocab_size": 31, "n_layers": 2, "max_seq_len": 16, "tie_embeddings": False}
    model = Model(Model.Config(**sizes))
    window = torch.randint(31, (1, 17), generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=250)
    for _ in range(250):
        optimizer.zero_grad()
        model.loss(window.expand(32, 17))[0].backward()  # 32 draws of what is hidden
        optimizer.step()
        schedule.step()
    hidden = torch.arange(16)[None] % 2 == 0
    assert -log_p(model, window[:, 1:], hidden)[hidden].mean() < 0.1


# Evaluation


def eval_set(n_windows=32):
    windows = torch.randint(VOCABULARY, (n_windows, 17), generator=torch.Generator().manual_seed(4))
    return EvalSet(windows, n_bytes=4 * windows[:, 1:].numel())


@pytest.mark.parametrize("name", ["masked_diffusion", "block_diffusion", "autoregressive_twin"])
def test_an_evaluation_draws_until_its_error_is_small_and_says_how_large_it_is(name):
    Model = MODELS[name]
    torch.manual_seed(0)
    model = Model(Model.Config(vocab_size=VOCABULARY, max_seq_len=16, d_model=8, n_layers=1, n_heads=2, d_ff=8))
    result = evaluate(model, eval_set(), 8, MACHINE, Ranks(), seed=1)
    assert 2 <= result["eval_draws"] < 200 and 0 <= result["eval_loss_error"] < 0.01
    assert result == evaluate(model, eval_set(), 8, MACHINE, Ranks(), seed=1)
    assert "at most" in in_words(result) and "a bound" in in_words(result)
    to_bits = 1 / math.log(2) / 4
    assert result["eval_bits_per_byte_error"] == pytest.approx(result["eval_loss_error"] * to_bits)
    others = [evaluate(model, eval_set(), 8, MACHINE, Ranks(), seed=seed)["eval_loss"] for seed in range(2, 8)]
    assert torch.tensor(others).std() < 0.025  # as far apart as an error of 0.01 lets them be


def test_the_loss_of_a_causal_model_has_no_error():
    result = evaluate(tiny_model("baseline").float(), eval_set(), 2, MACHINE, Ranks())
    assert set(result) == {"eval_loss", "eval_perplexity", "eval_bits_per_byte"}
    assert "at most" not in in_words(result)


def test_a_comparison_marks_a_bound():
    class Run:
        def __init__(self, **last):
            self.last = last

    exact, bound = Run(eval_loss=2.5), Run(eval_loss=3.0, eval_loss_error=0.0084)
    assert bounded([exact], "eval_loss") == "2.5000"
    assert bounded([bound], "eval_loss") == "≤ 3.0000 (draws: 0.0084)"
    both = bounded([bound, Run(eval_loss=3.2, eval_loss_error=0.0091)], "eval_loss")
    assert both == "≤ 3.1000 ± 0.1414 (draws: 0.0091)"


# Writing


@every_denoiser
@pytest.mark.parametrize("settings", [Unmasking(), Unmasking(steps=3, block_size=8, order="random", guidance=0.5)])
def test_prompts_of_different_lengths_are_continued_as_each_would_be_alone(name, settings, tokens):
    model = tiny_model(name)
    model.unmasking = settings
    padding = torch.tensor([0, 5, 11])
    together = write(model, tokens[:, :13], 21, sampler_of(3), padding)
    assert together.shape == (3, 21) and together.max() < VOCABULARY
    for row, n in enumerate(padding):
        alone = write(model, tokens[row : row + 1, n:13], 21, sampler_of(1, seed=row))
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("name", ["llada", "dream"])
@pytest.mark.parametrize("sampler", [greedy, sampler_of(3)])
def test_guidance_works_where_the_vocabulary_has_an_entry_for_hidden_tokens(name, sampler, tokens):
    """As in published weights: it is never written, and the other logits are numbers."""
    model = tiny_model(name, mask_token=5)
    model.unmasking = Unmasking(guidance=0.5)
    written = write(model, tokens.clamp(min=6), 21, sampler)
    assert written.max() < VOCABULARY and 5 not in written


@every_denoiser
def test_a_text_ends_where_the_context_is_full(name, tokens):
    model = tiny_model(name)
    assert write(model, tokens, 1000).shape == (3, model.config.max_seq_len - 24)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("n_prompt", [1, 4, 7, 8])
def test_blocks_through_the_cache_are_those_of_recomputing_everything(name, n_prompt, tokens):
    """The loop that the paper describes, without a cache: the surest token of the block in each step."""
    model = tiny_model(name, block_size=4)
    text = torch.cat([tokens[:1, :n_prompt], torch.full((1, 20 - n_prompt), model.mask_token)], 1)
    for first in range(n_prompt // 4 * 4, 20, 4):
        while (hidden := text[0, first : first + 4] == model.mask_token).any():
            p = model(text[:, : first + 4])[0, first:].softmax(-1).amax(-1).masked_fill(~hidden, -1)
            place = first + int(p.argmax())
            text[0, place] = model(text[:, : first + 4])[0, place].argmax()
    assert torch.equal(write(model, tokens[:1, :n_prompt], 20 - n_prompt), text[:, n_prompt:])


@pytest.mark.parametrize("name", WHOLE)
def test_whole_texts_are_written_as_the_paper_says(name, tokens):
    """LLaDA's loop by hand, greedy: block after block, the surest tokens first, later blocks hidden."""
    model = tiny_model(name)
    model.unmasking = Unmasking(steps=2, block_size=4)
    text = torch.cat([tokens[:1, :9], torch.full((1, 12), model.mask_token)], 1)
    for first in range(9, 21, 4):
        for _ in range(2):
            p, best = model.choices(model.aligned(model.hidden(text))).softmax(-1).max(-1)
            for place in p[0].masked_fill(text[0] != model.mask_token, -1)[first : first + 4].topk(2).indices + first:
                text[0, place] = best[0, place]
    assert torch.equal(write(model, tokens[:1, :9], 12), text[:, 9:])


def test_a_text_that_outgrows_its_cache_goes_on_as_without_a_cache():
    model = tiny_model("block_diffusion", block_size=4, max_seq_len=STEP + 40)
    prompt = torch.randint(VOCABULARY, (2, STEP - 6), generator=torch.Generator().manual_seed(5))
    text = torch.cat([prompt, write(model, prompt, 30)], 1)
    for first in range(STEP - 4, STEP + 20, 4):  # the last token of a block to be written was the surest
        for row in range(2):
            left = [
                text[row : row + 1, : first + 4].index_fill(1, torch.tensor([first + i]), model.mask_token)
                for i in range(4)
            ]
            guesses = [int(model(t)[0, first + i].argmax()) for i, t in enumerate(left)]
            assert any(g == text[row, first + i] for i, g in enumerate(guesses))


@every_denoiser
def test_each_block_has_a_random_order_of_its_own(name, tokens, monkeypatch):
    """Recorded where the sampler is asked: which places of a block are still hidden."""
    model, orders = tiny_model(name, **({"block_size": 8} if name in BLOCKS else {})), []
    model.unmasking = Unmasking(steps=8, block_size=8, order="random")
    predict = type(model).predict

    def recorded(self, *inputs):
        orders.append(tuple((inputs[-1][0] == self.mask_token).tolist()))
        return predict(self, *inputs)

    monkeypatch.setattr(type(model), "predict", recorded)
    write(model, tokens[:1, :8], 32)
    blocks = [orders[i : i + 8] for i in range(0, 32, 8)]
    assert len(orders) == 32 and len(set(map(str, blocks))) == 4


def test_visible_tokens_stay_and_each_step_writes_as_many():
    block = torch.tensor([[7, 9, 9, 9, 9, 9, 9], [9, 9, 9, 7, 7, 9, 9]])
    hidden, seen = block == 9, []

    def predict(block):
        seen.append(block.clone())
        return torch.eye(10)[torch.arange(7)].expand(2, 7, 10)

    written = fill_in(block, hidden, predict, greedy, Unmasking(steps=3))
    assert torch.equal(written, torch.where(hidden, torch.arange(7), block))
    assert [(s == 9).sum(1).tolist() for s in seen] == [[6, 5], [4, 3], [2, 1]]


def test_the_surest_token_comes_first_and_a_random_order_is_another():
    confidence = torch.tensor([1.0, 4.0, 2.0, 3.0])
    logits = torch.zeros(1, 4, 5)
    logits[0, :, 1] = confidence

    def order(**settings):
        found, hidden = [], torch.ones(1, 4, dtype=torch.bool)

        def predict(block):
            found.append(block.clone())
            return logits

        found.append(fill_in(torch.zeros(1, 4, dtype=torch.long), hidden, predict, greedy, Unmasking(4, **settings)))
        return [int((b - a).argmax()) for a, b in itertools.pairwise(found)]

    assert order() == [1, 3, 2, 0]
    drawn = {tuple(order(order="random", seed=seed)) for seed in range(40)}
    assert len(drawn) > 10 and all(sorted(o) == [0, 1, 2, 3] for o in drawn)


def test_written_one_by_one_in_random_order_texts_have_the_likelihood_that_training_bounds():
    model = tiniest("masked_diffusion")
    text = torch.tensor(list(itertools.product(range(3), repeat=3)))
    prompt = torch.tensor([[2]])
    whole = torch.cat([prompt.expand(27, 1), text], 1)
    order = [int(i) + 1 for i in torch.rand(3, generator=torch.Generator().manual_seed(0)).argsort(descending=True)]
    expected = log_p_in_order_from(model, whole, [0], order).exp()
    n = 6000
    model.unmasking = Unmasking(order="random")
    one = (torch.Generator().manual_seed(0),) * n
    drawn = write(model, prompt.expand(n, 1), 3, Sampler(one))
    seen = (drawn * torch.tensor([9, 3, 1])).sum(1).bincount(minlength=27) / n
    torch.testing.assert_close(seen.double(), expected, rtol=0, atol=0.02)


def log_p_in_order_from(model, text, known, order):
    total, done = 0, list(known)
    for place in order:
        hidden = torch.ones(text.shape[1], dtype=torch.bool)
        hidden[done] = False
        total = total + log_p(model, text, hidden.expand_as(text))[:, place]
        done.append(place)
    return total


def test_guidance_pushes_away_from_what_the_model_says_without_the_prompt(tokens):
    model = tiny_model("masked_diffusion")
    text = torch.cat([tokens[:, :9], torch.full((3, 4), model.mask_token)], 1)
    part, block = slice(9, 13), text[:, 9:]
    plain = model.predict(text.clone(), part, 9, 0, block)
    model.unmasking = Unmasking(guidance=1.5)
    guided = model.predict(text.clone(), part, 9, 0, block)
    unprompted = model(torch.full_like(text, model.mask_token))[:, 9:]
    torch.testing.assert_close(guided, 2.5 * plain - 1.5 * unprompted)


def test_blocks_come_token_by_token_and_end_at_the_stop_token():
    class Scripted:
        config = tiny_model("baseline").config
        tok_embed = torch.nn.Embedding(1, 1)

        def generate(self, tokens, max_new_tokens, sampler, padding):
            yield torch.tensor([[4, 0, 8], [5, 6, 7]])
            yield torch.tensor([[8, 8], [0, 9]])
            raise AssertionError("both texts have ended")

    steps = list(generate_tokens(Scripted(), [[1], [1]], 10, greedy, stop=0))
    assert steps == [[4, 5], [0, 6], [None, 7], [None, 0]]


def test_a_sampler_draws_for_several_places_as_it_does_for_one():
    logits = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0))
    sampler = Sampler(sampler_of(2).generators, 0.7, top_k=4, top_p=0.9)
    kept = torch.zeros(2, 3, 9)
    for _ in range(300):
        kept.scatter_(-1, sampler(logits)[..., None], 1)
    for row, place in itertools.product(range(2), range(3)):
        alone = Sampler(sampler_of(1).generators * 300, 0.7, top_k=4, top_p=0.9)(logits[row, place].expand(300, -1))
        assert set(alone.tolist()) == set(kept[row, place].nonzero()[:, 0].tolist())


def test_a_draw_with_a_temperature_is_the_papers_gumbel_noise():
    """LLaDA's formula: the largest of exp(logits) / (-log u)^temperature, u uniform."""
    draw, temperature, n = torch.Generator().manual_seed(0), 0.7, 40_000
    logits = torch.tensor([0.3, 1.5, -0.4, 0.9])
    noise = -torch.rand(n, 4, generator=draw, dtype=torch.float64).log()
    theirs = (logits.double().exp() / noise**temperature).argmax(-1).bincount(minlength=4) / n
    ours = Sampler((draw,), temperature)(logits.expand(1, n, 4)).flatten().bincount(minlength=4) / n
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.012)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"steps": 0}, "steps = 0"),
        ({"block_size": 0}, "block_size = 0"),
        ({"order": "sideways"}, "sideways"),
        ({"guidance": math.nan}, r"guidance = nan must be a finite number \(--unmasking\.guidance\)"),
        ({"guidance": -math.inf}, r"guidance = -inf must be a finite number \(--unmasking\.guidance\)"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        Unmasking(**settings)


# Costs


@pytest.mark.parametrize("name", ["masked_diffusion", "block_diffusion", "llada"])
@pytest.mark.parametrize("steps", [1, 2, 8])
def test_the_cost_of_a_written_token_is_what_torch_counts(name, steps):
    """Three blocks after a prompt of one, without the products of attention, whose cost depends on empty slots."""
    model = tiny_model(name, max_seq_len=32, **({"block_size": 8} if name == "block_diffusion" else {}))
    model.unmasking = Unmasking(steps=steps, block_size=8)
    with FlopCounterMode(display=False) as counter:
        write(model, torch.zeros(1, 8, dtype=torch.long), 24)
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    attention = sum(block.mixer.flops(32) for block in model.blocks)
    costs, passes = describe(model), model.passes_per_token(32)
    prompt = 8 * (costs["flops_per_token"] - 2 * model.head_weight().numel() - attention)
    formula = 24 * (costs["flops_per_written_token"] - passes["writing_blocks"] * attention)
    assert products == pytest.approx(formula + (prompt if name == "block_diffusion" else 0), rel=1e-12)


def test_more_steps_cost_more_and_the_baseline_writes_for_one_pass():
    costs = []
    for steps in (1, 8, 32):
        model = tiny_model("masked_diffusion")
        model.unmasking = Unmasking(steps=steps)
        costs.append(describe(model)["flops_per_written_token"])
    assert costs[1] == 8 * costs[0] and costs[2] == 32 * costs[0]
    causal = describe(tiny_model("baseline"))
    assert causal["flops_per_written_token"] == causal["flops_per_token"]


def test_training_blocks_takes_both_copies_through_the_blocks():
    model = tiny_model("block_diffusion")
    head = 2 * model.head_weight().numel()
    costs = describe(model)
    assert costs["training_flops_per_token"] == 3 * (2 * costs["flops_per_token"] - head)


# LLaDA, Dream and SDAR as published


def save_as_llada(theirs, folder: Path) -> None:
    """A Llama of transformers, under the names of LLaDA's repository."""
    from safetensors.torch import save_file

    names = {"self_attn.o_proj": "attn_out", "mlp.gate_proj": "ff_proj", "mlp.up_proj": "up_proj"}
    names |= {"mlp.down_proj": "ff_out", "input_layernorm": "attn_norm", "post_attention_layernorm": "ff_norm"}
    tensors = {}
    for name, tensor in theirs.state_dict().items():
        for old, new in {**names, "self_attn.": "", "model.layers": "model.transformer.blocks"}.items():
            name = name.replace(old, new)
        name = name.replace("model.embed_tokens", "model.transformer.wte").replace(
            "model.norm", "model.transformer.ln_f"
        )
        tensors[name.replace("lm_head", "model.transformer.ff_out")] = tensor.contiguous()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    c = theirs.config
    sizes = {"d_model": c.hidden_size, "n_layers": c.num_hidden_layers, "mlp_hidden_size": c.intermediate_size}
    sizes |= {"n_heads": c.num_attention_heads, "n_kv_heads": c.num_key_value_heads, "vocab_size": VOCABULARY}
    sizes |= {"embedding_size": VOCABULARY, "max_sequence_length": 64, "rms_norm_eps": c.rms_norm_eps}
    sizes |= {"rope_theta": 500.0, "mask_token_id": 90, "weight_tying": False}
    (folder / "config.json").write_text(json.dumps(PUBLISHED_LLADA | sizes), encoding="utf-8")


PUBLISHED_LLADA = {
    **dict(activation_type="silu", alibi=False, alibi_bias_max=8.0, architectures=["LLaDAModelLM"], rope=True),
    **dict(attention_dropout=0.0, attention_layer_norm=False, attention_layer_norm_with_affine=True, init_std=0.02),
    **dict(auto_map={}, bias_for_layer_norm=False, block_group_size=1, block_type="llama", d_model=4096),
    **dict(embedding_dropout=0.0, embedding_size=126_464, eos_token_id=126_081, flash_attention=False),
    **dict(include_bias=False, include_qkv_bias=False, init_cutoff_factor=None, init_device="meta", init_fn="mitchell"),
    **dict(input_emb_norm=False, layer_norm_type="rms", layer_norm_with_affine=True, mask_token_id=126_336),
    **dict(max_sequence_length=4096, mlp_hidden_size=12_288, mlp_ratio=4, model_type="llada", n_heads=32),
    **dict(multi_query_attention=None, n_kv_heads=32, n_layers=32, pad_token_id=126_081, precision="amp_bf16"),
    **dict(residual_dropout=0.0, rms_norm_eps=1e-5, rope_full_precision=True, rope_theta=500_000.0),
    **dict(scale_logits=False, transformers_version="4.46.3", use_cache=False, vocab_size=126_464, weight_tying=False),
}
"""config.json of GSAI-ML/LLaDA-8B-Instruct."""
PUBLISHED_SDAR = {
    **dict(architectures=["SDARForCausalLM"], attention_bias=False, attention_dropout=0.0, auto_map={}, debug=False),
    **dict(attn_implementation="flex_attention", bos_token_id=151_643, eos_token_id=151_643, ep_size=1, head_dim=128),
    **dict(fuse_cross_entropy=True, hidden_act="silu", hidden_size=2048, initializer_range=0.02, model_type="sdar"),
    **dict(intermediate_size=6144, max_position_embeddings=32_768, max_window_layers=28, micro_forward=False),
    **dict(num_attention_heads=16, num_hidden_layers=28, num_key_value_heads=8, rms_norm_eps=1e-6, rope_scaling=None),
    **dict(rope_theta=1_000_000, skip_checkpoint=False, sliding_window=None, tie_word_embeddings=False),
    **dict(torch_dtype="bfloat16", transformers_version="4.52.4", use_cache=False, use_deepep=False),
    **dict(use_sliding_window=False, vocab_size=151_936),
}
"""config.json of JetLM/SDAR-1.7B-Chat, which names neither block_size nor mask_token_id."""
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}


@torch.no_grad()
def unmasked_logits(theirs, tokens):
    """A model of transformers that sees everything: a mask of zeros passes through unchanged."""
    zeros = torch.zeros(len(tokens), 1, tokens.shape[1], tokens.shape[1])
    return theirs(tokens, attention_mask=zeros, use_cache=False).logits


@pytest.mark.parametrize("heads", [2, 4])
def test_llada_equals_a_llama_that_sees_everything(heads, tmp_path):
    theirs = original("LlamaForCausalLM", num_key_value_heads=heads, **ROPE)
    save_as_llada(theirs, tmp_path / "llada")
    ours, tokens = load_pretrained(tmp_path / "llada"), draw_tokens(40)
    assert type(ours) is LLaDA and ours.mask_token == 90
    expected = unmasked_logits(theirs, tokens)
    assert expected.std() > 0.1 and not torch.allclose(expected, theirs(tokens, use_cache=False).logits, atol=0.1)
    torch.testing.assert_close(ours(tokens).detach(), expected, rtol=0, atol=2e-5)
    again = load_pretrained(export_pretrained(ours, tmp_path / "again"))
    assert again.config == ours.config
    assert torch.equal(again(tokens), ours(tokens))


def test_dream_equals_a_qwen2_that_sees_everything_and_predicts_one_place_ahead(tmp_path):
    theirs = original("Qwen2ForCausalLM", **ROPE)
    theirs.save_pretrained(tmp_path / "dream")
    file = tmp_path / "dream" / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config |= {"model_type": "Dream", "architectures": ["DreamModel"], "mask_token_id": 90, "use_mrope": False}
    file.write_text(json.dumps(config), encoding="utf-8")
    ours, tokens = load_pretrained(tmp_path / "dream"), draw_tokens(40)
    expected = unmasked_logits(theirs, tokens)
    assert type(ours) is Dream and ours.mask_token == 90
    torch.testing.assert_close(ours(tokens).detach(), expected, rtol=0, atol=2e-5)
    predicted = ours.choices(ours.aligned(ours.hidden(tokens))).detach()
    torch.testing.assert_close(predicted[:, 1:, :90], expected[:, :-1, :90], rtol=0, atol=2e-5)
    assert predicted[..., 90].isneginf().all()


@pytest.mark.parametrize("published", [{}, {"block_size": 8, "mask_token_id": 90}])
def test_sdar_equals_a_qwen3_whose_mask_lets_a_block_see_itself(published, tmp_path):
    """The clean text, and both copies in one pass: positions repeat, and the mask is written out place by place."""
    theirs = original("Qwen3ForCausalLM", head_dim=16, tie_word_embeddings=False, **ROPE)
    theirs.save_pretrained(tmp_path / "sdar")
    file = tmp_path / "sdar" / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config |= {"model_type": "sdar", "architectures": ["SDARForCausalLM"], "mask_token_id": 90, **published}
    file.write_text(json.dumps(config), encoding="utf-8")
    ours, tokens, size = load_pretrained(tmp_path / "sdar"), draw_tokens(40), published.get("block_size", 4)
    assert type(ours) is SDAR and ours.mask_token == 90 and ours.config.block_size == size
    torch.testing.assert_close(ours(tokens).detach(), masked_logits(theirs, tokens, size), rtol=0, atol=2e-5)
    hidden = torch.rand(2, 40, generator=torch.Generator().manual_seed(3)) < 0.5
    noisy = tokens.masked_fill(hidden, 90)
    expected = masked_logits(theirs, torch.cat([noisy, tokens], 1), size, copies=2)[:, :40]
    torch.testing.assert_close(ours.unembed(ours.denoise(noisy, tokens)).detach(), expected, rtol=0, atol=2e-5)
    again = load_pretrained(export_pretrained(ours, tmp_path / "again"))
    assert again.config == ours.config
    assert torch.equal(again(tokens), ours(tokens))


@torch.no_grad()
def masked_logits(theirs, tokens, block_size, copies=1):
    """A model of transformers with the mask of block diffusion, decided for each pair of places by itself."""
    n = tokens.shape[1] // copies
    mask = torch.full((len(tokens), 1, copies * n, copies * n), torch.finfo().min)
    for q, k in itertools.product(range(copies * n), repeat=2):
        q_clean, k_clean = q >= (copies - 1) * n, k >= (copies - 1) * n
        own, earlier = k % n // block_size == q % n // block_size, k % n // block_size < q % n // block_size
        if (own and q_clean == k_clean) or (earlier and k_clean):
            mask[:, :, q, k] = 0
    positions = (torch.arange(copies * n) % n).expand(len(tokens), -1)
    return theirs(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits


def test_the_published_config_is_the_published_size():
    assert LLaDA.Config(**read_config(PUBLISHED[LLaDA], PUBLISHED_LLADA)) == SIZES[LLaDA]["llada-8b"]
    dream = dict(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4)
    dream |= dict(
        intermediate_size=18_944, vocab_size=152_064, rms_norm_eps=1e-6, rope_theta=1e6, mask_token_id=151_666
    )
    dream |= dict(max_position_embeddings=131_072, model_type="Dream", tie_word_embeddings=False)
    assert Dream.Config(**read_config(PUBLISHED[Dream], dream)) == SIZES[Dream]["dream-7b"]
    assert SDAR.Config(**read_config(PUBLISHED[SDAR], PUBLISHED_SDAR)) == SIZES[SDAR]["sdar-1.7b"]


@pytest.mark.parametrize(
    ("Model", "size", "n"),
    [
        (LLaDA, "llada-8b", 8_015_581_184),
        (Dream, "dream-7b", 7_615_616_512),
        (SDAR, "sdar-1.7b", 2_031_739_904),
        (SDAR, "sdar-8b", 8_190_735_360),
    ],
)
def test_published_sizes_have_the_published_number_of_parameters(Model, size, n):
    with torch.device("meta"):
        model = Model(SIZES[Model][size])
    assert sum(parameter.numel() for parameter in model.parameters()) == n


@pytest.mark.parametrize(
    "change", [{"alibi": True}, {"block_type": "sequential"}, {"embedding_size": 128}, {"include_qkv_bias": True}]
)
def test_another_architecture_of_the_same_code_is_refused(change):
    with pytest.raises(PretrainedError, match=next(iter(change))):
        read_config(PUBLISHED[LLaDA], PUBLISHED_LLADA | change)
