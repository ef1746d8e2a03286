"""Helpfulness models of the small world, one for each margin: what margins change.

    python -m scripts.reward_margins runs/chat/seed-0 --output DIR

The run is one of scripts/chat.sh --tiny. From its SFT model and on its comparisons a
model is trained in DIR with each margin of Table 27. The table says how often each is
right about held-out pairs, by rating (Table 28), and how far apart it puts them; the
picture, how scores spread (Figure 27), and what answers score by what they are worth by
the rule, in place of people (Figure 29). Its own draws are those of seed 0. Started
again, it goes on.
"""

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from llama_jax.config.finetune import Margin
from llama_jax.config.recipe import RewardRecipe, load_recipe
from llama_jax.data import Comparison, ComparisonLines
from llama_jax.errors import LlamaError
from llama_jax.finetune.reward import RewardModel, load_reward, train_reward
from scripts import raters
from scripts import small_world as world

MARGINS: tuple[Margin, ...] = get_args(Margin)
# Of scores, and of what answers are worth.
_BINS = np.linspace(0, 1, 11)


class Scored(NamedTuple):
    """What a model says of held-out pairs, before the sigmoid.

    Attributes:
      chosen: of the answers that people prefer.
      rejected: of the others.
    """

    chosen: Float[np.ndarray, " pairs"]
    rejected: Float[np.ndarray, " pairs"]


def main(argv: Sequence[str]) -> int:
    """Train, measure, show and draw; returns the exit status."""
    parser = argparse.ArgumentParser(description="Reward models by margin.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    try:
        return _compare(args.run, args.output)
    except LlamaError as error:
        print(f"reward_margins: {error}", file=sys.stderr)
        return 1


def _compare(run: Path, output: Path) -> int:
    for margin in MARGINS:
        workdir = output / margin
        if not train_reward(recipe(run, margin), workdir, init_from=run / "sft"):
            print(f"{workdir} is not at its end: start this again.")
            return 1
    pairs = list(ComparisonLines(run / "data/helpfulness_validation.jsonl"))
    scores = {margin: scored(load_reward(output / margin), pairs) for margin in MARGINS}
    console = Console(width=100, record=True)  # as wide as it needs to be, anywhere
    console.print(margin_table(scores, pairs))
    console.save_text(str(output / "margins.txt"))
    picture(scores, pairs).savefig(output / "margins.png", dpi=120)
    return 0


def recipe(run: Path, margin: Margin) -> RewardRecipe:
    """That of the small world's helpfulness model, with a margin."""
    like = load_recipe("configs/chat/small.py:helpfulness")
    assert isinstance(like, RewardRecipe)
    return dataclasses.replace(
        like,
        data=dataclasses.replace(like.data, paths=(str(run / "rows/helpfulness"),)),
        reward=dataclasses.replace(like.reward, margin=margin),
    )


def scored(model: RewardModel, pairs: Sequence[Comparison]) -> Scored:
    """Every answer by itself."""
    return Scored(
        *(
            model.score(
                [
                    [*pair.messages, {"role": "assistant", "content": answer}]
                    for pair, answer in zip(pairs, answers, strict=True)
                ]
            )
            for answers in _answers(pairs)
        )
    )


def margin_table(scores: Mapping[Margin, Scored], pairs: Sequence[Comparison]) -> Table:
    """Shares of pairs in order, by rating, and the mean gap between their scores."""
    names = [name for _, name in raters.RATINGS]
    ratings = np.array([pair.rating for pair in pairs])
    table = Table(
        *("margin", "all", *names, "gap"),
        title="Pairs in order",
        caption="gap: chosen less rejected, before the sigmoid",
    )
    counts = [f"{np.sum(ratings == name):,}" for name in names]
    table.add_row("pairs", f"{len(pairs):,}", *counts, "")
    for margin, told in scores.items():
        gaps = told.chosen - told.rejected
        of_each = (gaps, *(gaps[ratings == name] for name in names))
        cells = [f"{np.mean(some > 0):.1%}" if len(some) else "" for some in of_each]
        table.add_row(margin, *cells, f"{np.mean(gaps):.2f}")
    return table


def picture(scores: Mapping[Margin, Scored], pairs: Sequence[Comparison]) -> Figure:
    """How scores spread, and the mean score of answers by what they are worth."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    spread, worth = figure.subplots(1, 2)
    true = np.concatenate([_worth(pairs, answers) for answers in _answers(pairs)])
    # The last bin takes what is worth 1.
    bins = np.digitize(true, _BINS[1:-1])
    for margin, told in scores.items():
        chance = 1 / (1 + np.exp(-np.concatenate(told).astype(np.float64)))
        shares, _ = np.histogram(chance, bins=_BINS)
        spread.stairs(shares / len(chance), _BINS, label=margin)
        places = [
            (np.mean(true[bins == b]), np.mean(chance[bins == b]))
            for b in np.unique(bins)
        ]
        worth.plot(*zip(*places, strict=True), "o-", label=margin)
    spread.set(xlabel="σ(score)", ylabel="share of answers")
    worth.set(xlabel="worth by the rule", ylabel="mean σ(score)", ylim=(0, 1))
    for axes in (spread, worth):
        axes.legend(title="margin")
    return figure


def _answers(pairs: Sequence[Comparison]) -> tuple[list[str], list[str]]:
    return [pair.chosen for pair in pairs], [pair.rejected for pair in pairs]


def _worth(pairs: Sequence[Comparison], answers: Sequence[str]) -> np.ndarray:
    return np.array(
        [
            world.helpfulness(pair.messages, answer)
            for pair, answer in zip(pairs, answers, strict=True)
        ]
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
