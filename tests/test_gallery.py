"""The gallery: what describe says of unlike models, pictures without overlaps, and a page that tells the truth."""

import functools
import inspect
import json
import math
import re
import struct
import sys
from itertools import combinations

import pytest
import torch
from conftest import tiny_model
from torch import nn
from training import MODEL as TINY
from training import script, train_baseline, write_corpus

from llm.analysis import accounting
from llm.data.files import open_tokens
from llm.gallery import catalog, page
from llm.gallery import describe as describe_module
from llm.gallery.__main__ import main
from llm.gallery.catalog import entries, picture
from llm.gallery.compare import marks
from llm.gallery.decay import decays
from llm.gallery.describe import describe, unknown_parts
from llm.gallery.diagram import equation
from llm.gallery.docstrings import about, date_of
from llm.gallery.fold import fold
from llm.gallery.layout import layout
from llm.gallery.png import INSTALL, find_browser
from llm.gallery.results import results
from llm.gallery.scene import Text
from llm.gallery.svg import draw
from llm.models import MODELS
from llm.modules.blocks import Block
from llm.modules.position_encoding.t5_bias import bucket
from llm.modules.recurrent.retention import LightningAttention

ENTRIES = entries()
PRE_NORM = "x = x + mixer(mixer_norm(x)); x = x + ffn(ffn_norm(x))"
EXPECTED = {
    "baseline": f"""
tok_embed: Token embedding (vocab_size 10,000, d_model 512, times sqrt(d_model))
  add_sinusoidal: Sinusoidal position encoding
4 x Pre-norm: {PRE_NORM}
  mixer_norm: RMSNorm
  mixer: Multi-head attention (n_heads 16, n_kv_heads 16, head_dim 32)
    mask: Causal mask
  ffn_norm: RMSNorm
  ffn: MLP (d_ff 2,048, activation gelu)
norm: RMSNorm
head: Output head (vocab_size 10,000, tied to the token embedding)""",
    "parallel_block": """
tok_embed: Token embedding (vocab_size 10,000, d_model 512, times sqrt(d_model))
  add_sinusoidal: Sinusoidal position encoding
4 x Parallel: h = norm(x); x = x + mixer(h) + ffn(h)
  norm: RMSNorm
  mixer: Multi-head attention (n_heads 16, n_kv_heads 16, head_dim 32)
    mask: Causal mask
  ffn: MLP (d_ff 2,048, activation gelu)
norm: RMSNorm
head: Output head (vocab_size 10,000, tied to the token embedding)""",
    "post_norm": """
tok_embed: Token embedding (vocab_size 10,000, d_model 512, times sqrt(d_model))
  add_sinusoidal: Sinusoidal position encoding
4 x Post-norm: x = mixer_norm(x + mixer(x)); x = ffn_norm(x + ffn(x))
  mixer: Multi-head attention (n_heads 16, n_kv_heads 16, head_dim 32)
    mask: Causal mask
  mixer_norm: RMSNorm
  ffn: MLP (d_ff 2,048, activation gelu)
  ffn_norm: RMSNorm
head: Output head (vocab_size 10,000, tied to the token embedding)""",
    "alibi": f"""
tok_embed: Token embedding (vocab_size 10,000, d_model 512, times sqrt(d_model))
4 x Pre-norm: {PRE_NORM}
  mixer_norm: RMSNorm
  mixer: Multi-head attention (n_heads 16, n_kv_heads 16, head_dim 32)
    mask: Causal mask
    score_bias: ALiBi
  ffn_norm: RMSNorm
  ffn: MLP (d_ff 2,048, activation gelu)
norm: RMSNorm
head: Output head (vocab_size 10,000, tied to the token embedding)""",
    "sparse": f"""
tok_embed: Token embedding (vocab_size 10,000, d_model 512, times sqrt(d_model))
  add_sinusoidal: Sinusoidal position encoding
2 x
  1 x Pre-norm: {PRE_NORM}
    mixer_norm: RMSNorm
    mixer: Multi-head attention (n_heads 16, n_kv_heads 16, head_dim 32)
      mask: Own block mask (stride 32)
    ffn_norm: RMSNorm
    ffn: MLP (d_ff 2,048, activation gelu)
  1 x Pre-norm: {PRE_NORM}
    mixer_norm: RMSNorm
    mixer: Multi-head attention (n_heads 16, n_kv_heads 16, head_dim 32)
      mask: Summaries mask (stride 32, n_summary 4)
    ffn_norm: RMSNorm
    ffn: MLP (d_ff 2,048, activation gelu)
norm: RMSNorm
head: Output head (vocab_size 10,000, tied to the token embedding)""",
    "gpt2-xl": f"""
tok_embed: Token embedding (vocab_size 50,257, d_model 1,600)
  position: Learned position
48 x Pre-norm: {PRE_NORM}
  mixer_norm: LayerNorm (bias)
  mixer: Multi-head attention (n_heads 25, n_kv_heads 25, head_dim 64, bias in q_proj, k_proj, v_proj, o_proj)
    mask: Causal mask
  ffn_norm: LayerNorm (bias)
  ffn: MLP (d_ff 6,400, activation gelu_tanh, bias in up_proj, down_proj)
norm: LayerNorm (bias)
head: Output head (vocab_size 50,257, tied to the token embedding)""",
    "qwen3-8b": f"""
tok_embed: Token embedding (vocab_size 151,936, d_model 4,096)
36 x Pre-norm: {PRE_NORM}
  mixer_norm: RMSNorm
  mixer: Grouped-query attention (n_heads 32, n_kv_heads 8, head_dim 128)
    rope: RoPE (theta 1,000,000, rotary_dim 128)
    q_norm, k_norm: 2 × RMSNorm
    mask: Causal mask
  ffn_norm: RMSNorm
  ffn: SwiGLU (d_ff 12,288, activation silu)
norm: RMSNorm
head: Output head (vocab_size 151,936, a matrix of its own)""",
    "deepseek-v3": f"""
tok_embed: Token embedding (vocab_size 129,280, d_model 7,168)
3 x Pre-norm: {PRE_NORM}
  mixer_norm: RMSNorm
  mixer: Latent attention (n_heads 128, kv_split 512 + 64, q_split 128 + 64, expanded_split 128 + 128, scale 0.1352, \
q_lora_rank 1,536)
    rope: RoPE (theta 10,000, rotary_dim 64, interleaved, scaling YaRN)
    q_a_norm: RMSNorm
    kv_a_norm: RMSNorm
    mask: Causal mask
  ffn_norm: RMSNorm
  ffn: SwiGLU (d_ff 18,432, activation silu)
58 x Pre-norm: {PRE_NORM}
  mixer_norm: RMSNorm
  mixer: Latent attention (n_heads 128, kv_split 512 + 64, q_split 128 + 64, expanded_split 128 + 128, scale 0.1352, \
q_lora_rank 1,536)
    rope: RoPE (theta 10,000, rotary_dim 64, interleaved, scaling YaRN)
    q_a_norm: RMSNorm
    kv_a_norm: RMSNorm
    mask: Causal mask
  ffn_norm: RMSNorm
  ffn: MoE
    router: Sigmoid router (n_experts 256, top_k 8, scale 2.5, n_groups 8, top_k_groups 4)
    experts: Gated experts (n_experts 256, d_expert 2,048, activation silu)
    shared: SwiGLU (d_ff 2,048, activation silu)
norm: RMSNorm
head: Output head (vocab_size 129,280, a matrix of its own)""",
    "gemma2": """
tok_embed: Token embedding (vocab_size 10,000, d_model 512, times sqrt(d_model))
2 x
  1 x Sandwich norm: x = x + mixer_output_norm(mixer(mixer_norm(x))); x = x + ffn_output_norm(ffn(ffn_norm(x)))
    mixer_norm: Zero centred RMSNorm
    mixer: Grouped-query attention (Soft capped attention, n_heads 16, n_kv_heads 4, head_dim 32, scale 0.1768, \
soft_cap 50)
      rope: RoPE (theta 10,000, rotary_dim 32)
      mask: Window mask (size 256)
    mixer_output_norm: Zero centred RMSNorm
    ffn_norm: Zero centred RMSNorm
    ffn: GeGLU (d_ff 1,376, activation gelu_tanh)
    ffn_output_norm: Zero centred RMSNorm
  1 x Sandwich norm: x = x + mixer_output_norm(mixer(mixer_norm(x))); x = x + ffn_output_norm(ffn(ffn_norm(x)))
    mixer_norm: Zero centred RMSNorm
    mixer: Grouped-query attention (Soft capped attention, n_heads 16, n_kv_heads 4, head_dim 32, scale 0.1768, \
soft_cap 50)
      rope: RoPE (theta 10,000, rotary_dim 32)
      mask: Causal mask
    mixer_output_norm: Zero centred RMSNorm
    ffn_norm: Zero centred RMSNorm
    ffn: GeGLU (d_ff 1,376, activation gelu_tanh)
    ffn_output_norm: Zero centred RMSNorm
norm: Zero centred RMSNorm
head: Output head (vocab_size 10,000, tied to the token embedding)
  cap: Cap""",
    "switch_transformer": f"""
tok_embed: Token embedding (vocab_size 10,000, d_model 512, times sqrt(d_model))
  add_sinusoidal: Sinusoidal position encoding
4 x Pre-norm: {PRE_NORM}
  mixer_norm: RMSNorm
  mixer: Multi-head attention (n_heads 16, n_kv_heads 16, head_dim 32)
    mask: Causal mask
  ffn_norm: RMSNorm
  ffn: MoE
    router: Switch router (n_experts 8, top_k 1, capacity_factor 2)
    experts: Plain experts (n_experts 8, d_expert 2,048, activation gelu)
norm: RMSNorm
head: Output head (vocab_size 10,000, tied to the token embedding)""",
}


@pytest.fixture(scope="session")
def built():
    """Every picture's model, without memory for its weights."""
    return {name: entry.build() for name, entry in ENTRIES.items()}


@pytest.fixture(scope="session")
def diagrams(built):
    return {name: picture(entry, built[name]) for name, entry in ENTRIES.items()}


@pytest.fixture(scope="session")
def data():
    return json.loads(json.dumps(page.payload()))


@pytest.mark.parametrize("name", EXPECTED)
def test_a_picture_says_what_the_model_is(name, diagrams):
    assert diagrams[name].outline() == EXPECTED[name].strip()


def test_layers_fold_into_a_pattern_with_what_remains(diagrams):
    whole, rest = diagrams["gemma3-1b"].stacks
    assert (whole.repeat, [n for n, _ in whole.blocks]) == (4, [5, 1])
    assert rest.blocks == ((2, whole.blocks[0][1]),)
    assert "2 × Window mask, as above" in draw(diagrams["gemma3-1b"])
    a, b, c = (Block(nn.Identity(), nn.Identity(), nn.Identity) for _ in range(3))
    assert [(s.repeat, [n for n, _ in s.blocks]) for s in fold([a] * 24)] == [(1, [24])]
    assert [(s.repeat, [n for n, _ in s.blocks]) for s in fold([c, a, b, a, b, a, b])] == [(1, [1]), (3, [1, 1])]


def test_parts_for_training_only_stand_apart(diagrams):
    assert [part.title for part in diagrams["deepseek_v3"].training_only] == ["Prediction module"]
    assert not diagrams["deepseek-v3"].training_only


def test_the_code_explains_every_part_and_every_block(diagrams):
    unknown = {name: found for name, diagram in diagrams.items() if (found := unknown_parts(diagram))}
    assert unknown == {}


class Undocumented(nn.Module):
    def forward(self, x, positions=None, cache=None):
        return x if x.sum() > 0 else -x


class Untraceable(Block):
    """Its forward pass depends on values."""

    def forward(self, x, positions, cache=None):
        return x + self.mixer(x, positions, cache) if x.sum() > 0 else x


def test_an_unknown_part_is_a_plain_box_and_an_untraceable_block_a_plain_list():
    model = tiny_model("baseline")
    Undocumented.__module__ = "llm.undocumented"
    sys.modules["llm.undocumented"] = sys.modules[__name__]
    block = Untraceable(model.blocks[0].mixer, Undocumented(), nn.Identity)
    model.blocks = nn.ModuleList([block])
    diagram = describe(model)
    assert [part.title for part in diagram.blocks()[0][1].parts] == ["Multi-head attention", "Undocumented"]
    assert not diagram.blocks()[0][1].traced
    assert "Undocumented" in draw(diagram)
    check_places(diagram)


class Gated(nn.Module):
    """A block whose gate scales what its mixer adds, beside a second input."""

    def __init__(self, mixer, ffn):
        super().__init__()
        self.mixer, self.ffn = mixer, ffn

    def forward(self, x, positions, cache=None, first_values=None):
        y = self.mixer(x, positions, cache)
        return x + y * self.ffn(first_values).sigmoid() + self.ffn(y)


class WithFirstValues(MODELS["baseline"]):
    """Gives its blocks a second input."""

    def run_blocks(self, x, positions, layers, tokens):
        first = x
        for block in self.blocks:
            x = block(x, positions, first_values=first)
        return x


def test_other_operations_and_inputs_are_steps_of_their_own():
    model = WithFirstValues(MODELS["baseline"].Config(**MODELS["baseline"].Config.small))
    model.blocks = nn.ModuleList([Gated(model.blocks[0].mixer, model.blocks[0].ffn)])
    diagram = describe(model)
    labels = {node.label for node in diagram.blocks()[0][1].nodes}
    assert {"x", "first_values", "mixer", "ffn", "mul", "sigmoid", "+"} <= labels
    assert "sigmoid" in equation(diagram.blocks()[0][1])
    check_places(diagram)


def test_an_input_is_drawn_only_into_the_blocks_that_are_given_it(diagrams):
    (_, first), (_, others) = diagrams["rwkv7"].blocks()
    assert equation(first) == PRE_NORM
    assert equation(others) == "x = x + mixer(mixer_norm(x), v_first); x = x + ffn(ffn_norm(x))"
    assert diagrams["rwkv7"].note == "The values of the first layer go beside the stream to all other layers."


# --- places


def overlaps(a, b, slack=0.0):
    (l1, t1, r1, b1), (l2, t2, r2, b2) = a, b
    return l1 + slack < r2 and l2 + slack < r1 and t1 + slack < b2 and t2 + slack < b1


def inside(inner, outer):
    return inner[0] >= outer[0] and inner[1] >= outer[1] and inner[2] <= outer[2] and inner[3] <= outer[3]


def check_places(diagram):
    """No box or label covers another or leaves what holds it, and lines pass beside all boxes but frames."""
    scene = layout(diagram)
    frames = [box for box in scene.boxes if box.style in ("stack", "block")]
    solid = [box for box in scene.boxes if box not in frames]
    whole = (0, 0, scene.width, scene.height)
    check_siblings(diagram.name, whole, solid, scene.texts)
    for frame in frames:
        assert inside(frame.bounds, whole), (diagram.name, frame)
        assert all(inside(text.bounds, frame.bounds) for text in frame.texts) and not cut(frame.texts), frame
        bar = (frame.x, frame.y, frame.x + frame.width, frame.y + 28)
        for box in [*solid, *(other for other in frames if other is not frame)]:
            assert not overlaps(bar, box.bounds) or (box in frames and inside(frame.bounds, box.bounds)), (frame, box)
            assert not overlaps(frame.bounds, box.bounds) or inside(box.bounds, frame.bounds) or box in frames
    for line in scene.lines:
        for (x0, y0), (x1, y1) in zip(line.points, line.points[1:], strict=False):
            stretch = (min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))
            assert inside(stretch, whole)
            assert not [box for box in solid if overlaps(stretch, box.bounds, 0.5)], (diagram.name, line)


def cut(texts):
    return [text.text for text in texts if text.text.endswith("..")]


def check_siblings(name, outer, boxes, texts):
    for thing in [*boxes, *texts]:
        assert inside(thing.bounds, outer), (name, thing, outer)
    for a, b in combinations([*boxes, *texts], 2):
        assert not overlaps(a.bounds, b.bounds, 0.5 if isinstance(a, Text) and isinstance(b, Text) else 0), (name, a, b)
    assert not cut(texts), name
    for box in boxes:
        check_siblings(name, box.bounds, box.boxes, box.texts)


@pytest.mark.parametrize("name", ENTRIES)
def test_nothing_overlaps_or_leaves_the_picture(name, diagrams):
    check_places(diagrams[name])


def test_every_part_is_drawn_once_and_can_be_chosen(diagrams):
    for name, diagram in diagrams.items():
        numbers = [int(n) for n in re.findall(r'data-part="(\d+)"', draw(diagram))]
        assert sorted(numbers) == list(range(len(diagram.parts()))), name


# --- differences


def test_differences_are_marked_by_what_and_by_size(diagrams):
    def marked(name, other):
        parts = diagrams[name].parts()
        return {
            parts[k].slot if isinstance(k, int) else k: v for k, v in marks(diagrams[name], diagrams[other]).items()
        }

    assert marked("baseline", "baseline") == {}
    assert marked("swiglu", "baseline") == {"ffn": "changed"}
    assert marked("sliding_window", "baseline") == {"mixer.mask": "changed"}
    assert marked("post_norm", "baseline") == {"block 0": "changed"}
    assert marked("qwen3", "llama") == {"mixer.q_norm, k_norm": "new"}
    assert marked("qwen2", "llama") == {"mixer": "changed"}  # biases
    assert marked("gpt2-xl", "gpt2-large")["mixer"] == "resized"
    assert marked("llama3.1-8b", "llama3-8b") == {"mixer.rope": "changed"}


# --- the words beside a picture


def test_docstrings_give_idea_equation_paper_blog_and_line():
    rope = about("llm.modules.position_encoding.rope:RoPE")
    assert rope.idea.startswith("Rotary position embedding (RoPE): rotate each pair")
    assert "f_i = theta^(-2i / d)" in rope.equation
    assert (rope.papers, rope.blog) == (("2104.09864",), "Position encoding, RoPE")
    line = (page.FOLDER.parents[1] / rope.file).read_text(encoding="utf-8").splitlines()[rope.line - 1]
    assert line == "class RoPE(nn.Module):"
    assert about("llm.modules.norms:LayerNorm").equation.startswith("LayerNorm(x) ")
    assert about("llm.modules.norms:RMSNorm").papers[0] == "1910.07467"


@pytest.mark.parametrize(
    "name, date",
    [("gpt2-xl", (2019, 2)), ("llama2-7b", (2023, 7)), ("qwen3-8b", (2025, 5)), ("qwen2.5-3b", (2024, 12)),
     ("gemma2", (2024, 7)), ("gemma3-1b", (2025, 3)), ("deepseek-v3", (2024, 12)),
     ("kimi-k2", (2025, 7)), ("alibi", (2021, 8))],
)  # fmt: skip
def test_a_model_is_dated_by_its_docstring(name, date):
    assert catalog.date(ENTRIES[name]) == date


def test_a_text_without_a_date_gives_none():
    assert date_of("Model", "No paper yet.") == (0, 0)


def test_what_a_model_changes_of_its_base_class():
    assert catalog.ancestry(ENTRIES["rope"].Model) == catalog.Ancestry(
        ("nope", "baseline", "Transformer"), ("make_mixer",), ("rope_theta",)
    )
    assert catalog.ancestry(ENTRIES["gemma2"].Model).lineage == ("WindowedGemma", "gemma", "Transformer")


def test_every_models_docstring_names_its_page():
    names: dict[str, list[str]] = {}
    for name, Model in MODELS.items():
        names.setdefault(Model.__module__, []).append(name)
    for module, models in names.items():
        line = "Gallery: docs/gallery/index.html" + ", ".join(f"#{name}" for name in models)
        doc = inspect.getdoc(sys.modules[module])
        assert doc.splitlines()[-1] == line, f"the docstring of {module} must end with the line `{line}`"


def test_the_table_names_what_a_box_only_holds(diagrams):
    assert catalog.fields(diagrams["parallel_hybrid"])["mixer"] == "Parallel mixers: Multi-head attention + Mamba 2"
    assert catalog.fields(diagrams["mamba2"])["ffn"] == "none"
    assert catalog.idea(MODELS["deepseek_v3"]).endswith("multi-token prediction in training.")
    assert catalog.idea(MODELS["qwen3"]).endswith("A norm on each query and key head.")


# --- figures


def test_figures_of_every_model_are_those_of_accounting(data, built):
    for model in data["models"]:
        costs, truth = model["costs"], built[model["name"]]
        assert costs["parameters"] == sum(p.numel() for p in truth.parameters()), model["name"]
        assert costs["active"] == accounting.active_parameters(truth), model["name"]
        for k in (0, 3, 10):
            context = data["contexts"][k]
            try:
                counted = accounting.describe(truth, context)
            except ValueError:  # learned positions end
                assert context > truth.config.max_seq_len
                counted = {"flops_per_token": None, "cache_bytes_per_token": None}
            flops, cache = counted["flops_per_token"], counted["cache_bytes_per_token"]
            assert costs["flops"][k] == (flops if flops is None else round(flops)), model["name"]
            assert costs["cache"][k] == (cache if cache is None else cache * context), model["name"]


@pytest.mark.parametrize("name", ["baseline", "gemma2", "masked_diffusion", "switch_transformer", "deepseek-v2-lite"])
def test_the_page_shows_what_training_prints(name, data):
    (model,) = (model for model in data["models"] if model["name"] == name)
    assert "\n".join(model["costs"]["printed"]) == accounting.summary(ENTRIES[name].build().float())


def test_a_training_script_prints_this_summary(tmp_path, capsys):
    data = write_corpus(tmp_path)
    train_baseline(data, tmp_path / "run", "--steps", 1)
    sizes = {"vocab_size": open_tokens(data).vocab_size, "d_ff": 64}
    sizes |= {name.removeprefix("--model.").replace("-", "_"): value for name, value in TINY.items()}
    Baseline = MODELS["baseline"]
    assert accounting.summary(Baseline(Baseline.Config(**sizes))) in capsys.readouterr().out


def only_training(name):
    model = ENTRIES[name].build()
    return sum(p.numel() for part in model.training_only for p in getattr(model, part).parameters())


@pytest.mark.parametrize("name", ["baseline", "gemma3-1b", "deepseek_v3", "qwen3-30b-a3b"])
def test_the_boxes_of_a_picture_add_up_to_the_model(name, data):
    (model,) = (model for model in data["models"] if model["name"] == name)
    tops = [part for part in model["parts"] if "." not in part["slot"]]
    assert sum(part["parameters"] * max(part["layers"], 1) for part in tops) == model["costs"][
        "parameters"
    ] - only_training(name)
    flops = sum((part["flops"] or [0])[0] * max(part["layers"], 1) for part in tops)
    assert flops == pytest.approx(model["costs"]["flops"][0], rel=1e-6)


def test_a_drawn_mask_is_the_mask(data):
    (model,) = (model for model in data["models"] if model["name"] == "sliding_window")
    (mask,) = model["sights"]["masks"]
    assert mask["name"] == "Window mask, size 128" and mask["length"] == 240
    rows = mask["rows"]
    assert all(int(row[i]) >= 5 for i, row in enumerate(rows))  # a token sees itself
    assert all(set(row[i + 1 :]) <= {"0"} for i, row in enumerate(rows))  # and nothing later
    assert rows[-1].startswith("0" * 20) and rows[-1][:-1].endswith("9" * 20)


def test_rope_speeds_show_the_scaling(data):
    (model,) = (model for model in data["models"] if model["name"] == "llama3.1-8b")
    (rope,) = model["sights"]["ropes"]
    assert len(rope["plain"]) == 64
    assert rope["scaled"][0] == rope["plain"][0] and rope["scaled"][-1] == pytest.approx(
        8 * rope["plain"][-1], rel=0.01
    )


def sights_of(name, data):
    return next(model["sights"] for model in data["models"] if model["name"] == name)


def test_the_bias_of_alibi_is_a_straight_line_for_each_head(data):
    (bias,) = sights_of("alibi", data)["biases"]
    slopes = [-(2 ** (-8 * h / 16)) for h in range(1, 17)]
    assert [curve[0] for curve in bias["curves"]] == [[0, 0]] * 16
    assert [curve[1] for curve in bias["curves"]] == [[255, pytest.approx(255 * slope, rel=0.01)] for slope in slopes]


def test_a_learned_bias_is_drawn_in_the_steps_of_its_buckets(data):
    (bias,) = sights_of("t5_bias", data)["biases"]
    (curve,) = bias["curves"]
    assert "before training" in bias["caption"]
    by_distance = torch.tensor([p[1] for p in curve]), torch.tensor([p[0] for p in curve])
    values, at = by_distance
    assert torch.equal(at[:17], torch.arange(17))  # 16 distances with a bucket of their own
    steps = bucket(torch.arange(256), 32, 128)
    for distance, value in curve:
        same = values[steps[at] == steps[distance]]
        assert torch.equal(same, torch.full_like(same, value))
    assert len(set(values.tolist())) > 25 and 0.002 < values.abs().max() < 0.1


def test_a_bias_that_depends_on_the_query_says_so(data):
    (bias,) = sights_of("relative_position", data)["biases"]
    assert "depends on the query" in bias["caption"] and len(bias["curves"]) == 3


def decays_of(name, data):
    return [(decay["name"], decay["rates"], decay["distinct"]) for decay in sights_of(name, data)["decays"]]


def test_decays_are_those_of_the_formulas(data):
    near = functools.partial(pytest.approx, rel=5e-3)
    ((_, rates, _),) = decays_of("retnet", data)
    assert rates == near([-math.log(1 - 2.0 ** -(5 + h)) for h in (3, 2, 1, 0)])
    assert decays_of("gated_linear_attention", data) == [("Gated linear attention", near([math.log(2) / 16]), 1)]
    assert decays_of("delta_net", data) == [("Delta net", [0], 1)]
    assert decays_of("linear_attention", data) == [("Linear attention", [0], 1)]
    ((_, rates, n),) = decays_of("rwkv7", data)
    assert n > len(rates) == 16
    ends = [math.exp(-0.5) / (1 + math.exp(-bias)) for bias in (-6.5, -1.5)]
    assert [rates[0], rates[-1]] == near(ends)
    ((_, rates, _),) = decays_of("mamba", data)  # steps from 0.001 to 0.1, rates from 1 to 16
    assert 0.00099 < rates[0] < 0.0012 and 1.2 < rates[-1] < 1.61
    assert [name for name, _, _ in decays_of("parallel_hybrid", data)] == ["Mamba 2"]
    assert decays_of("baseline", data) == []


def test_layers_that_decay_otherwise_are_drawn_first_and_last():
    model = tiny_model("nope")
    for layer, block in enumerate(model.blocks):
        block.mixer = LightningAttention(d_model=model.config.d_model, n_heads=4, depth=float(layer))
    first, last = decays(model)
    assert [first["name"], last["name"]] == ["Lightning attention, layer 1", "Lightning attention, layer 2"]
    assert first["rates"] == pytest.approx([2.0**-8, 2.0**-6, 2.0**-4, 2.0**-2], rel=5e-3)
    assert last["rates"] == pytest.approx([1e-5 * rate for rate in first["rates"]], rel=5e-3)


# --- results


LADDER = {"study": "ladder", "match": "flops", "tokens": 131_072_000, "parameters": 17_707_520, "seed": 0}
LADDER |= {"active_parameters": 17_707_520, "flops_per_token": 37_000_000.0, "eval_bits_per_byte": 0.7}


def write_runs(file, *runs):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(run) + "\n" for run in runs), encoding="utf-8")


def test_rows_about_a_model_come_from_the_tables_of_the_docs():
    table = next(table for table in results("qwen3") if table["page"] == "docs/case_studies.md")
    row = dict(table["rows"])
    assert table["title"] == "Case studies and published weights"
    assert row["norm"] == "RMSNorm, pre, QK-norm" and float(row["parity"]) < 1e-4


def test_the_ladder_shows_a_model_at_its_best_rate_beside_the_others(tmp_path):
    runs = [
        {"model": "baseline", "rate": 1e-3, "eval_loss": 1.5},
        {"model": "rope", "rate": 1e-3, "eval_loss": 1.3},
        {"model": "rope", "rate": 1e-3, "eval_loss": 1.5, "seed": 1, "eval_bits_per_byte": 0.8},
        {"model": "rope", "rate": 3e-3, "eval_loss": 1.39},  # better than one seed, not than the mean of 1.4
        {"model": "rope", "rate": 3e-3, "eval_loss": 1.43, "seed": 1},
        {"model": "alibi", "rate": 1e-3, "eval_loss": 1.2},
        {"model": "rope", "rate": 1e-3, "eval_loss": 0.9, "match": "none", "tokens": 1_000_000},
        {"model": "rope", "rate": 1e-3, "eval_loss": 0.1, "study": "another"},
    ]
    write_runs(tmp_path / "results" / "ladder.jsonl", *({**LADDER, **run} for run in runs))
    (table,) = results("rope", tmp_path)
    assert table["head"] == ["", "equal FLOPs, 131 M tokens", "size as it is, 1.00 M tokens"]
    rows = {name: cells for name, *cells in table["rows"]}
    assert rows["eval loss"] == ["1.400 (1.300 to 1.500)", "0.900"]
    assert rows["that of baseline"] == ["1.500", ""]
    assert rows["place"] == ["2 of 3", "1 of 1"] and rows["seeds"] == ["2", "1"]
    assert rows["bits per byte"][0] == "0.750" and rows["learning rate"][0] == "0.001"
    assert rows["parameters"][0] == "17.7 M" and rows["FLOPs a token"][0] == "37.0 M"
    assert results("gpt2", tmp_path) == []


def test_the_probes_are_shown_as_their_script_prints_them(tmp_path, capsys):
    file, flags = tmp_path / "results" / "probes.jsonl", ["--steps", "2", "--batch-size", "2", "--processes", "1"]
    flags += ["--length", "8"]
    flags += ["--models", "baseline", "rope", "--tasks", "parity", "nested", "--seeds", "2"]
    file.parent.mkdir()
    script("probe").main([*flags, "--out", str(file)])
    printed = capsys.readouterr().out
    (table,) = results("rope", tmp_path)  # probes.md beside it holds the same and is not read
    assert table["head"] == ["task", "1 ×", "2 ×", "4 ×", "baseline", "guess"]
    assert [row[0] for row in table["rows"]] == ["parity", "nested"]
    for i in range(3):
        assert f"| rope | {' | '.join(row[1 + i] for row in table['rows'])} |" in printed
    assert f"| baseline | {' | '.join(row[4] for row in table['rows'])} |" in printed
    assert [row[5] for row in table["rows"]] == ["50", "50"]


def test_a_damaged_record_is_named(tmp_path):
    write_runs(tmp_path / "results" / "probes.jsonl", {"model": "rope"}, 3)
    with pytest.raises(ValueError, match=r"probes.jsonl, line 2 is no JSON object: '3'"):
        results("rope", tmp_path)


# --- the page and the commands


def test_the_page_is_small_and_loads_nothing():
    html = page.PAGE.read_text(encoding="utf-8")
    assert len(html.encode()) < page.LIMIT
    assert not re.findall(r'(?:src|data-src)="(?!data:)|<link[^>]+href="(?!data:)|@import|url\(|fetch\(|XMLHttp', html)


def test_the_committed_page_is_what_the_code_draws(data):
    html = page.PAGE.read_text(encoding="utf-8")
    hint = "run `python -m llm.gallery` and commit docs/gallery/index.html"
    assert page.fill("") == re.sub(r'(id="data">).*?(</script>)', r"\1\2", html, flags=re.DOTALL), hint
    committed = page.unpack(html)
    assert [m["name"] for m in committed["models"]] == [m["name"] for m in data["models"]], hint
    for old, new in zip(committed["models"], data["models"], strict=True):
        assert {key for key in new if old.get(key) != new[key]} == set(), f"{new['name']}: {hint}"
    assert committed == data, hint


def test_the_picture_in_the_readme_is_what_the_code_draws(diagrams):
    svg = page.PAGE.with_name("qwen3.svg").read_text(encoding="utf-8")
    assert svg == draw(diagrams["qwen3-8b"], marks(diagrams["qwen3-8b"], diagrams["llama3.1-8b"]), "light")
    assert "docs/gallery/qwen3.svg" in (page.FOLDER.parents[1] / "README.md").read_text(encoding="utf-8")


def test_a_picture_for_slides_stands_alone(tmp_path, capsys):
    out = tmp_path / "qwen3.svg"
    main(["qwen3", "--vs", "llama", "--out", str(out)])
    svg = out.read_text(encoding="utf-8")
    assert "var(" not in svg and 'class="part norm new"' in svg
    main(["qwen3", "--size", "qwen3-0.6b"])
    assert "28 x Pre-norm" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [(["qwen4"], "qwen3"), (["llama", "--vs", "lama"], "llama"), (["llama", "--out", "x.gif"], ".svg or .png")],
)
def test_errors_name_what_there_is(arguments, message):
    out = [] if "--out" in arguments else ["--out", "x.svg"]
    with pytest.raises(SystemExit, match=re.escape(message)):
        main([*arguments, *out])


def test_a_size_belongs_to_its_model(capsys):
    with pytest.raises(SystemExit, match=r"qwen3 has no size 'llama3-8b'; there are qwen3-0.6b, .*--size"):
        main(["qwen3", "--size", "llama3-8b"])
    with pytest.raises(SystemExit, match="rope has no size 'llama3-8b'; it is published in none"):
        main(["rope", "--size", "llama3-8b"])


def test_the_page_is_html_and_a_folder_for_a_picture_is_made(tmp_path):
    with pytest.raises(SystemExit, match=r"x.svg must end in .html"):
        main(["--out", "x.svg"])
    main(["qwen3", "--size", "qwen3-8b", "--out", str(tmp_path / "slides" / "qwen3.svg")])
    assert 'class="part norm' in (tmp_path / "slides" / "qwen3.svg").read_text(encoding="utf-8")


@pytest.mark.skipif(find_browser() is None, reason=f"Chromium is not installed: {INSTALL}")
def test_a_png_has_two_pixels_for_each_unit_of_the_svg(tmp_path):
    main(["qwen3", "--vs", "llama", "--out", str(tmp_path / "qwen3.svg")])
    main(["qwen3", "--vs", "llama", "--out", str(tmp_path / "qwen3.png")])
    svg, png = (tmp_path / "qwen3.svg").read_text(encoding="utf-8"), (tmp_path / "qwen3.png").read_bytes()
    width, height = map(float, re.search(r'width="(.+?)" height="(.+?)"', svg).groups())
    assert struct.unpack(">II", png[16:24]) == (2 * math.ceil(width), 2 * math.ceil(height))


def test_a_png_without_a_browser_says_how_to_get_one(tmp_path, monkeypatch):
    monkeypatch.setattr("llm.gallery.png.find_browser", lambda: None)
    with pytest.raises(SystemExit, match="apt-get install -y chromium"):
        main(["llama", "--out", str(tmp_path / "llama.png")])


def test_describing_a_model_leaves_random_numbers_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    describe_module.scales_embedding.cache_clear()
    picture(ENTRIES["nope"])
    assert torch.equal(torch.rand(1), expected)
