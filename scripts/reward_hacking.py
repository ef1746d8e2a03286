"""PPO without its KL term, by the rule of the small world: what reward models miss.

    python -m scripts.reward_hacking runs/chat/seed-0 --output DIR

The run is one of scripts/chat.sh --tiny. From its V5 a policy learns for three times
as long as its PPO did: in DIR/held with the KL term of the recipe, in DIR/free with
beta 0, in DIR/stopped so too, until held-out prompts stop it. Each pass over these is a
row of a table: what the reward models say of answers, what these are worth by the rule,
how far they are from V5. Started again, it goes on.
"""

import argparse
import dataclasses
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import llama_jax
from llama_jax.checkpoint.manager import CHECKPOINTS
from llama_jax.config.recipe import PpoRecipe, load_recipe
from llama_jax.finetune.ppo import ppo
from llama_jax.llm import LLM
from llama_jax.train.metrics import METRICS, read_metrics
from scripts.chat_report import answers_worth

# Five iterations; a checkpoint for each pass over held-out prompts.
_STEPS_OF_A_PASS = 15
# What each learns with. The early stop comes after passes that are no better; beyond
# half a nat none is.
VARIANTS: dict[str, dict[str, Any]] = {
    "held": {},
    "free": {"beta": 0.0},
    "stopped": {"beta": 0.0, "patience": 2, "max_kl": 0.5},
}


def main(argv: Sequence[str]) -> int:
    """Learn, measure and show; returns the exit status."""
    parser = argparse.ArgumentParser(description="PPO without its KL term.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=300)
    args = parser.parse_args(argv)
    begun = args.run / "v5"
    for name, options in VARIANTS.items():
        if not ppo(recipe(args.run, **options), args.output / name, init_from=begun):
            print(f"{args.output / name} is not at its end: start this again.")
            return 1
    console = Console(width=100, record=True)  # as wide as it needs to be, anywhere
    v5 = llama_jax.load(begun)
    for name in VARIANTS:
        console.print(passes_table(args.output / name, v5, args.prompts))
    console.save_text(str(args.output / "hacking.txt"))
    return 0


def recipe(run: Path, **options: Any) -> PpoRecipe:
    """That of the small world's PPO, longer, with some options."""
    like = load_recipe("configs/chat/small.py:ppo")
    assert isinstance(like, PpoRecipe)
    return dataclasses.replace(
        like,
        data=dataclasses.replace(like.data, paths=(str(run / "rows/prompts"),)),
        train=dataclasses.replace(
            like.train,
            num_steps=3 * like.train.num_steps,
            validate_every=_STEPS_OF_A_PASS,
            checkpoint_every=_STEPS_OF_A_PASS,
            keep_latest=3 * like.train.num_steps // _STEPS_OF_A_PASS + 1,
        ),
        ppo=dataclasses.replace(
            like.ppo,
            helpfulness=str(run / "helpfulness"),
            safety=str(run / "safety"),
            **options,
        ),
    )


def passes_table(workdir: Path, v5: LLM, num_prompts: int) -> Table:
    """Every pass over held-out prompts, and V5 before them."""
    table = Table(
        *("step", "reward models say", "by the rule", "violations", "KL", "cut"),
        title=str(workdir),
        caption="KL from V5, nats an answer; cut: answers that do not end",
    )

    def add(step: int, llm: LLM, said: str, kl: str, cut: str) -> None:
        told = answers_worth(llm, v5, random.Random(0), num_prompts)
        worth = f"{told['reward']:.3f} ± {told['reward_error']:.3f}"
        table.add_row(str(step), said, worth, f"{told['violations']:.1%}", kl, cut)

    add(0, v5, "", "", "")
    for record in read_metrics(workdir / METRICS):
        if "validation_reward" in record:
            policy = llama_jax.load(workdir / CHECKPOINTS / str(record["step"]))
            measured = ("reward", ".3f"), ("kl", ".2f"), ("cut", ".0%")
            shown = (
                f"{record[f'validation_{name}']:{form}}" for name, form in measured
            )
            add(record["step"], policy, *shown)
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
