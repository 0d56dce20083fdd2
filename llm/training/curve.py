"""loss.png: the losses of a run against the tokens it was trained on; and what every picture here has in common."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llm.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_losses(metrics: list[dict], file: Path, title: str) -> None:
    """Draw the loss of each logged step, its running mean, and the eval loss."""
    figure = new_figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    from matplotlib.ticker import EngFormatter

    train = series(metrics, "loss")
    evaluation = series(metrics, "eval_loss")
    axes = figure.add_subplot()
    axes.plot(*train, color="#9ecae1", linewidth=0.8, label="train, each logged step")
    axes.plot(*running_mean(*train), color="#08519c", linewidth=1.8, label="train, running mean")
    axes.plot(*evaluation, color="#d94801", linewidth=1.4, marker="o", markersize=4, label="eval")
    axes.set_xlabel("training tokens")
    axes.set_ylabel("cross-entropy (nats per token)")
    axes.set_title(title, parse_math=False)  # a name may hold a dollar sign
    axes.xaxis.set_major_formatter(EngFormatter())  # 100 M
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with replacing(file) as picture:
        figure.savefig(picture, format="png")


def new_figure(**options: Any) -> "Figure":
    """An empty figure of matplotlib, without pyplot: no window and no global state.

    MPLBACKEND is not read. In a notebook's environment it names a backend that only the notebook's own Python may have,
    and matplotlib could not even be imported.
    """
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        from matplotlib.figure import Figure
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    return Figure(**options)


def try_to_draw(draw: Callable[..., None], what: object, path: Path, *more: object) -> None:
    """`draw(what, path, *more)`. No picture stops a command: where it fails, one line says so."""
    try:
        draw(what, path, *more)
    except Exception as error:
        print(f"no {path.name}: {type(error).__name__}: {error}")
    else:
        print(f"drawn in {path}")


def series(metrics: list[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and values, each (N,), of the lines that have both."""
    points = [(line["tokens"], line[name]) for line in metrics if None not in (line.get("tokens"), line.get(name))]
    tokens, values = np.array(points, dtype=float).reshape(-1, 2).T
    return tokens, values


def running_mean(tokens: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean over the 2 % of points around each, fewer at both ends; empty where there are too few points."""
    half = len(values) // 100 + 2
    if len(values) < 4 * half:
        return tokens[:0], values[:0]
    spans = [slice(max(0, i - half), i + half + 1) for i in range(len(values))]
    return tokens, np.array([values[span].mean() for span in spans])
