"""Claims of papers, each with the runs that try it and the rule that decides what came out.

A rule compares two sides with the same seeds. "Holds" and "does not hold here" need a difference that a t-test tells
from noise (p < 0.05); all else is "cannot be told at this size". Four kinds of evidence are compared: the eval loss of
the ladder at equal FLOPs, each model at its best rate; that of runs with other settings (llm/analysis/studies.py); the
accuracy of probes (llm/analysis/probes.py); and the loss of texts longer than those of training
(llm/analysis/length.py).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from llm.analysis.results import at_best_probe_rate, find
from llm.analysis.studies import Run, mean_and_error, t_95

SEEDS = 3
Result = dict[int, float]
"""By seed: a loss (infinite where the run diverged) or an accuracy."""


@dataclass(frozen=True)
class Best:
    """A model in the ladder: at the baseline's FLOPs and at its best rate."""

    model: str


@dataclass(frozen=True)
class Arm:
    """Training runs with settings of their own, at the baseline's FLOPs. `rate` multiplies the ladder's."""

    model: str
    rate: float = 1.0
    settings: dict[str, Any] = field(default_factory=dict)

    def runs(self, rate: float, settings: dict[str, Any]) -> list[Run]:
        return [Run(self.model, self.rate * rate, s, settings | self.settings, "flops") for s in range(SEEDS)]


@dataclass(frozen=True)
class Probe:
    """The accuracy of a model on a task, at so many times the trained length; at the best of the rates tried."""

    model: str
    task: str
    times: int = 1

    def result(self, rows: list[dict]) -> Result:
        """By seed; nothing where there are no rows."""
        runs = at_best_probe_rate(find(rows, model=self.model, task=self.task))
        return {run["seed"]: run["accuracy"][str(self.times)] for run in runs}


@dataclass(frozen=True)
class Long:
    """The loss at the end of the longest texts, for one model read in different ways."""

    model: str
    scaling: str | None = None
    tuned: bool = False

    def result(self, rows: list[dict]) -> Result:
        found = find(rows, model=self.model, scaling=self.scaling, tuned=self.tuned)
        return {row["seed"]: self.of(row["loss"]) for row in found if None not in row["loss"]}

    def of(self, loss: list[float]) -> float:
        return loss[-1]


class Reach(Long):
    """How much larger that loss is than with only as much text as in training, for models that differ there."""

    def of(self, loss: list[float]) -> float:
        return loss[-1] - loss[0]


Side = Best | Arm | Probe | Long
Verdict = Literal["holds", "does not hold here", "cannot be told at this size", "not run yet"]


@dataclass(frozen=True)
class Claim:
    """`first` is better than `second`; with a margin, `first` is worse by less than the margin, and with a negative
    margin it is better by more than that.

    `value` reads a training run's row: the eval loss, unless the claim is about something else.
    """

    text: str
    source: str
    first: Side
    second: Side
    margin: float | None = None
    value: Callable[[dict], float] | None = None


def better_by(claim: Claim, first: Result, second: Result) -> list[float]:
    """For each seed that both have, how much better the first is: a higher accuracy, a lower loss."""
    sign = 1 if isinstance(claim.first, Probe) else -1
    return [sign * (first[seed] - second[seed]) for seed in sorted(first.keys() & second.keys())]


def judge(claim: Claim, first: Result, second: Result) -> tuple[str, Verdict]:
    """What came out, in numbers, and what it says about the claim."""
    apart = better_by(claim, first, second)
    if len(apart) < SEEDS:
        return f"{len(apart)} of {SEEDS} seeds", "not run yet"
    infinite = [float("inf") in (a, b) for a, b in ((first[s], second[s]) for s in first.keys() & second.keys())]
    if any(infinite):
        one, other = (sum(value == float("inf") for value in side.values()) for side in (first, second))
        told: Verdict = "holds" if one == 0 and other == len(second) else "cannot be told at this size"
        return f"diverged: {one} and {other} of {SEEDS}", "does not hold here" if one > other else told
    mean, error = mean_and_error(apart)
    reach = t_95(len(apart)) * error
    shown = "{:+.1f} ± {:.1f} points" if isinstance(claim.first, Probe) else "{:+.3f} ± {:.3f}"
    scale, worst = 100 if isinstance(claim.first, Probe) else -1, -(claim.margin or 0.0)
    text = shown.format(scale * mean, abs(scale) * error)
    if mean - reach > worst:
        return text, "holds"
    return text, "does not hold here" if mean + reach < worst else "cannot be told at this size"


def imbalance(row: dict) -> float:
    """The largest expert's share of the choices over the mean share, the worst layer's: 1 is balanced."""
    return max(max(layer) * len(layer) for layer in row["expert_load"])


NO_WARMUP, MUON = {"warmup_steps": 0}, {"optimizer": "muon"}
CLAIMS = [
    Claim(
        "post-norm needs its warm-up",
        "On Layer Normalization in the Transformer Architecture, arXiv 2002.04745",
        Arm("post_norm", rate=0.5),
        Arm("post_norm", rate=0.5, settings=NO_WARMUP),
    ),
    Claim(
        "the same at a quarter of the rate",
        "arXiv 2002.04745",
        Arm("post_norm", rate=0.25),
        Arm("post_norm", rate=0.25, settings=NO_WARMUP),
    ),
    Claim(
        "pre-norm does without warm-up (loses less than 0.05 nats)",
        "arXiv 2002.04745",
        Arm("baseline", settings=NO_WARMUP),
        Arm("baseline"),
        margin=0.05,
    ),
    Claim(
        "the same at half the rate",
        "arXiv 2002.04745",
        Arm("baseline", rate=0.5, settings=NO_WARMUP),
        Arm("baseline", rate=0.5),
        margin=0.05,
    ),
    Claim(
        "QK-norm takes a rate at which the baseline diverges or falls behind (eight times the reference)",
        "Scaling Vision Transformers to 22 Billion Parameters, arXiv 2302.05442",
        Arm("qk_norm", rate=8),
        Arm("baseline", rate=8),
    ),
    Claim(
        "multi-query attention loses little (0.05 nats) for a quarter of the cache",
        "Fast Transformer Decoding, arXiv 1911.02150",
        Best("multi_query"),
        Best("baseline"),
        margin=0.05,
    ),
    Claim(
        "grouped queries lose little (0.05 nats) for half of the cache",
        "GQA, arXiv 2305.13245",
        Best("grouped_query"),
        Best("baseline"),
        margin=0.05,
    ),
    Claim(
        "grouped queries lose less than multi-query attention",
        "GQA, arXiv 2305.13245",
        Best("grouped_query"),
        Best("multi_query"),
    ),
    Claim(
        "one expert a token beats the dense model at equal FLOPs",
        "Switch Transformers, arXiv 2101.03961",
        Best("switch_transformer"),
        Best("baseline"),
    ),
    Claim(
        "three narrow experts of 16 and a shared one beat the dense model at equal FLOPs",
        "DeepSeekMoE, arXiv 2401.06066",
        Best("mixture_of_experts"),
        Best("baseline"),
    ),
    Claim(
        "loss-free balancing balances as well as the balance loss (largest expert's load over the mean, within 0.1)",
        "Auxiliary-Loss-Free Load Balancing Strategy, arXiv 2408.15664",
        Arm("loss_free_balancing"),
        Arm("mixture_of_experts"),
        margin=0.1,
        value=imbalance,
    ),
    Claim(
        "SwiGLU with two thirds of the width beats GELU at equal FLOPs (the 2/3 rule)",
        "GLU Variants Improve Transformer, arXiv 2002.05202",
        Best("swiglu"),
        Best("baseline"),
    ),
    Claim("RoPE beats sinusoidal positions", "RoFormer, arXiv 2104.09864", Best("rope"), Best("baseline")),
    Claim(
        "latent attention loses nothing (0.02 nats) against full attention with RoPE, at a fifth of the cache",
        "DeepSeek-V2, arXiv 2405.04434",
        Best("latent"),
        Best("rope"),
        margin=0.02,
    ),
    Claim(
        "a gate on the output of attention lowers the loss at equal FLOPs",
        "Gated Attention for Large Language Models, arXiv 2505.06708",
        Best("gated_attention"),
        Best("baseline"),
    ),
    Claim(
        "the parallel block loses nothing (0.02 nats)",
        "PaLM, arXiv 2204.02311",
        Best("parallel_block"),
        Best("baseline"),
        margin=0.02,
    ),
    Claim(
        "tied embeddings beat an untied head",
        "Using the Output Embedding to Improve Language Models, arXiv 1608.05859",
        Arm("baseline"),
        Arm("baseline", settings={"tie_embeddings": False}),
    ),
    Claim(
        "Muon needs fewer tokens than AdamW: it is lower after the same number",
        "Muon is Scalable for LLM Training, arXiv 2502.16982",
        Arm("baseline", settings=MUON),
        Arm("baseline"),
    ),
    Claim(
        "norms on the outputs beat pre-norm, also at the initialisation that is best for pre-norm",
        "2 OLMo 2 Furious, arXiv 2501.00656",
        Best("output_norm"),
        Best("baseline"),
    ),
    Claim(
        "norms on the outputs take a rate at which the baseline diverges or falls behind (eight times the reference)",
        "2 OLMo 2 Furious, arXiv 2501.00656",
        Arm("output_norm", rate=8),
        Arm("baseline", rate=8),
    ),
    Claim(
        "the gated delta rule beats retention at equal FLOPs",
        "Gated Delta Networks, arXiv 2412.06464",
        Best("gated_delta_net"),
        Best("retnet"),
    ),
    Claim(
        "three recurrent layers to one of attention lose nothing (0.02 nats) against full attention with RoPE",
        "Kimi Linear, arXiv 2510.26692",
        Best("hybrid"),
        Best("rope"),
        margin=0.02,
    ),
    Claim(
        "after as few tokens as here, the bound of masked diffusion lies far above the loss of a next-token model",
        "Large Language Diffusion Models, arXiv 2502.09992",
        Best("baseline"),
        Best("masked_diffusion"),
    ),
    Claim(
        "no position encoding reaches further than RoPE",
        "The Impact of Positional Encoding on Length Generalization, arXiv 2305.19466",
        Reach("nope"),
        Reach("rope"),
    ),
    Claim("ALiBi reaches further than RoPE", "ALiBi, arXiv 2108.12409", Reach("alibi"), Reach("rope")),
    Claim(
        "after a short training on long texts, YaRN is better than linear interpolation",
        "YaRN, arXiv 2309.00071",
        Long("rope", "YaRN", tuned=True),
        Long("rope", "linear interpolation", tuned=True),
    ),
    Claim(
        "a window breaks without the first tokens (loses at least 0.05 nats; positions are not renumbered)",
        "Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453",
        Long("rope", "first tokens and window"),
        Long("rope", "window"),
        margin=-0.05,
    ),
    Claim(
        "the delta rule recalls more pairs than retention",
        "Parallelizing Linear Transformers with the Delta Rule, arXiv 2406.06484",
        Probe("delta_net", "recall"),
        Probe("retnet", "recall"),
    ),
    Claim(
        "attention copies strings that a state-space model cannot copy",
        "Repeat After Me, arXiv 2402.01032",
        Probe("rope", "copy"),
        Probe("mamba2", "copy"),
    ),
    Claim(
        "a state that is only scaled by numbers in [0, 1] cannot track parity, an LSTM can",
        "Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues, arXiv 2411.12537",
        Probe("lstm", "parity", 4),
        Probe("mamba2", "parity", 4),
    ),
    Claim(
        "a diagonal state-space model cannot follow permutations of five things, an LSTM can",
        "The Illusion of State in State-Space Models, arXiv 2404.08819",
        Probe("lstm", "s5", 4),
        Probe("mamba2", "s5", 4),
    ),
    Claim(
        "attention cannot follow them either",
        "The Illusion of State in State-Space Models, arXiv 2404.08819",
        Probe("lstm", "s5", 4),
        Probe("rope", "s5", 4),
    ),
    Claim(
        "negative eigenvalues (beta up to 2) let a delta rule track parity",
        "Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues, arXiv 2411.12537",
        Probe("delta_net, max_beta = 2", "parity", 4),
        Probe("delta_net", "parity", 4),
    ),
    Claim(
        "they also let it follow swaps among five things",
        "Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues, arXiv 2411.12537",
        Probe("delta_net, max_beta = 2", "s5", 4),
        Probe("delta_net", "s5", 4),
    ),
    Claim(
        "a hybrid (a recurrent layer, then one of attention) recalls like full attention (5 points)",
        "Kimi Linear, arXiv 2510.26692",
        Probe("hybrid", "recall", 4),
        Probe("rope", "recall", 4),
        margin=0.05,
    ),
    Claim(
        "selected and compressed blocks find the needle that a window misses",
        "Native Sparse Attention, arXiv 2502.11089",
        Probe("native_sparse", "needle", 4),
        Probe("sliding_window", "needle", 4),
    ),
    Claim(
        "selected and compressed blocks recall pairs that lie beyond a window",
        "Native Sparse Attention, arXiv 2502.11089",
        Probe("native_sparse", "recall", 4),
        Probe("rope, window = 64", "recall", 4),
    ),
    Claim(
        "two layers of attention find what followed last time, one layer does not",
        "In-context Learning and Induction Heads, arXiv 2209.11895",
        Probe("rope", "induction"),
        Probe("rope, n_layers = 1", "induction"),
    ),
    Claim(
        "keys that hold the token before them (here by a short convolution) let one layer find it",
        "In-context Learning and Induction Heads, arXiv 2209.11895",
        Probe("delta_net, n_layers = 1", "induction"),
        Probe("rope, n_layers = 1", "induction"),
    ),
]
