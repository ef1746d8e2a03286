"""What a card shows as plots: runs by step, reward models, iterations, rows.

Each function returns what it can draw of what it is given: nothing, where there is
nothing to draw. P prompts, K answers to each.
"""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter

from llama_jax.finetune.rejection import RewardCurve
from llama_jax.train.metrics import Record

Plot = Callable[[Axes], None]

# Of a plot by step: its title, its unit, and lines by what a run calls their values.
_OPTIMIZER = ("Learning rate", "rate", {"learning_rate": "rate"})
_PPO = (
    ("Loss of the critic", "half squared error per token", {"value_loss": "critic"}),
    ("Reward", "mean of Rc", {"reward": "training", "validation_reward": "held out"}),
    (
        "Scores of the reward models",
        "mean of σ(score)",
        {"helpfulness": "helpfulness", "safety": "safety"},
    ),
    (
        "Divergence from the reference",
        "nats per answer",
        {"kl": "training", "validation_kl": "held out"},
    ),
    ("Length of answers", "tokens", {"answer_length": "length"}),
    ("Answers that were cut", "share of answers", {"cut": "cut"}),
    ("Clipped ratios", "share of tokens", {"clipped": "clipped"}),
)
# Plots in a row, and letters of the title above each.
_NUM_COLUMNS, _TITLE_WIDTH = 3, 42
# A line of fewer values shows each.
_MARKED = 40


def page(title: str, plots: Sequence[Plot]) -> Figure:
    """All plots on one page."""
    num_columns = min(len(plots), _NUM_COLUMNS)
    num_rows = -(-len(plots) // num_columns)
    figure = Figure(
        figsize=(4.8 * num_columns, 3.6 * num_rows + 0.4),
        dpi=120,
        layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12),
    )
    lines = textwrap.fill(title, _TITLE_WIDTH * num_columns)
    figure.suptitle(lines, parse_math=False)
    for number, plot in enumerate(plots, start=1):
        axes = figure.add_subplot(num_rows, num_columns, number)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        plot(axes)
    return figure


def series(records: Sequence[Record], name: str) -> list[tuple[int, float]]:
    """Steps and values of what records have under a name; no NaN is among them."""
    return [(r["step"], r[name]) for r in records if r.get(name) is not None]


def by_step(
    records: Sequence[Record], title: str, unit: str, lines: Mapping[str, str]
) -> list[Plot]:
    """A plot over the steps of a run, of the lines that have any values."""
    found = {
        label: points
        for name, label in lines.items()
        if (points := series(records, name))
    }

    def plot(axes: Axes) -> None:
        for label, points in found.items():
            marker = "o" if len(points) < _MARKED else ""
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, marker=marker, markersize=4, label=label)
        axes.set(title=title, xlabel="step", ylabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(found) > 1:
            axes.legend()

    return [plot] if found else []


def of_run(records: Sequence[Record], loss_unit: str) -> list[Plot]:
    """What there is of any run, of reward models and of PPO."""
    loss = {"loss": "training", "validation_loss": "held out"}
    plots = by_step(records, "Loss", loss_unit, loss)
    plots += by_step(records, *_OPTIMIZER)
    for each in _PPO:
        plots += by_step(records, *each)
    reports = [record for record in records if "accuracy" in record]
    return plots + (of_comparisons(reports[-1]) if reports else [])


def of_comparisons(report: Mapping[str, Any]) -> list[Plot]:
    """What a validation of a reward model reports."""

    def accuracy(axes: Axes) -> None:
        shares = report["accuracy_by_rating"]
        names = [f"{name}\n{share:.1%}" for name, share in shares.items()]
        axes.barh(names, shares.values())
        axes.axvline(0.5, color="black", linewidth=1, linestyle=":", zorder=0)
        axes.set(title="Accuracy by rating", xlabel="share of pairs", xlim=(0, 1))
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.invert_yaxis()

    def calibration(axes: Axes) -> None:
        told = report["calibration"]
        axes.plot(told["sure"], told["right"], "o-", label="this model")
        axes.plot((0.5, 1), (0.5, 1), "k:", linewidth=1, label="calibrated")
        axes.set(title="Calibration", xlabel="how sure it is, σ(|gap|)")
        axes.set(ylabel="how often it is right", xlim=(0.48, 1.02), ylim=(-0.02, 1.05))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.legend(loc="lower right")

    def scores(axes: Axes) -> None:
        for answer, shares in report["scores"].items():
            edges = np.linspace(0, 1, len(shares) + 1)
            axes.stairs(shares, edges, fill=True, alpha=0.5, label=answer)
        axes.set(
            title="Scores of answers", xlabel="σ(score)", ylabel="share of answers"
        )
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.legend()

    by_rating = [accuracy] if report["accuracy_by_rating"] else []
    return [*by_rating, calibration, scores]


def of_answers(told: Mapping[str, float]) -> list[Plot]:
    """What answers are worth to the reward models, and how far they have gone."""

    def worth(axes: Axes) -> None:
        names = ("reward", "helpfulness", "safety")
        axes.barh(
            [f"{name}\n{told[name]:.4g}" for name in names],
            [told[name] for name in names],
        )
        axes.set(title="Answers", xlabel="mean of Rc, and of σ(score)", xlim=(0, 1))
        axes.invert_yaxis()

    def divergence(axes: Axes) -> None:
        axes.barh([f"KL\n{told['kl']:.4g}"], [told["kl"]])
        axes.set(title="Divergence of answers", xlabel="nats per answer")

    return [worth, divergence]


def of_iteration(rewards: Float[np.ndarray, "P K"], curve: RewardCurve) -> list[Plot]:
    """Figure 7, and how rewards spread."""

    def by_samples(axes: Axes) -> None:
        for name, values in curve._asdict().items():
            sizes = range(1, len(values) + 1)
            marker = "o" if len(values) < _MARKED else ""
            axes.plot(sizes, values, marker=marker, markersize=4, label=f"{name} of N")
        axes.set(title="Reward by answers to choose from", xlabel="N, answers")
        axes.set(ylabel="mean of Rc over prompts")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()

    def spread(axes: Axes) -> None:
        best = rewards.max(axis=1)
        for name, values in (("all answers", rewards.ravel()), ("best of each", best)):
            weights = np.full(len(values), 1 / len(values))
            options = {"bins": 20, "range": (0, 1), "alpha": 0.5}
            axes.hist(values, weights=weights, label=name, **options)
        axes.set(title="Rewards", xlabel="Rc", ylabel="share")
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.legend()

    return [by_samples, spread]


def of_rows(turns: Sequence[int], lengths: Sequence[int]) -> list[Plot]:
    """How many rows to learn from are how long."""

    def by_turns(axes: Axes) -> None:
        axes.hist(turns, bins=np.arange(0.5, max(turns) + 1))
        axes.set(title="Turns", xlabel="questions in a row", ylabel="rows")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    def by_length(axes: Axes) -> None:
        axes.hist(lengths, bins=20)
        axes.set(title="Learnt answers", xlabel="characters", ylabel="rows")

    return [by_turns, by_length]
