"""`llama-jax train RECIPE`: run a recipe, or go on with it."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Generic, TypeVar

import tyro

from llama_jax.cli.progress import training_progress
from llama_jax.config.recipe import (
    EpochRecipe,
    PpoRecipe,
    RewardRecipe,
    SftRecipe,
    TrainingRecipe,
    load_recipe,
    to_json,
)
from llama_jax.data import open_data
from llama_jax.errors import DataError, RecipeError
from llama_jax.finetune.ppo_state import best_policy
from llama_jax.finetune.stages import kind_of
from llama_jax.model.count import num_params
from llama_jax.train.faults import EXIT_PREEMPTED
from llama_jax.train.layout import check_layout
from llama_jax.train.run import num_training_rows

_USAGE = """\
usage: llama-jax train RECIPE [options]

RECIPE is FILE.py:FUNCTION, as configs/demo.py:small; its type says what is done, as
pretraining or fine-tuning. Each field of a recipe is an option: `llama-jax train RECIPE
--help` lists them with the recipe's own values.
"""

_Recipe = TypeVar("_Recipe")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Generic[_Recipe]):
    """Run a recipe, or go on with it where its newest checkpoint stands.

    Attributes:
      recipe: FILE.py:FUNCTION.
      workdir: gets checkpoints, metrics and the tokenizer; local or a bucket.
      init_from: a checkpoint of any kind, whose parameters the run begins with.
      profile: steps to trace with jax.profiler, FIRST:LAST.
      dry_run: resolve and check the recipe, print it, and stop.
      fields: of the recipe.
    """

    recipe: tyro.conf.Positional[str]
    workdir: str = "runs/latest"
    init_from: str | None = None
    profile: str | None = None
    dry_run: bool = False
    fields: Annotated[_Recipe, tyro.conf.arg(name="")]


def run(argv: Sequence[str]) -> int:
    """The command; returns the exit status."""
    if not argv or argv[0].startswith("-"):
        asked = "--help" in argv or "-h" in argv
        print(_USAGE, end="", file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    default = load_recipe(argv[0])
    kind = kind_of(default)
    options: Options[Any] = tyro.cli(
        Options[kind.recipe],
        args=argv,
        prog="llama-jax train",
        default=Options(recipe=argv[0], fields=default),
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    recipe: TrainingRecipe = options.fields
    profile = _first_and_last(options.profile)
    if options.dry_run:
        print(json.dumps(to_json(recipe), indent=2))
        print(
            f"{num_params(recipe.model, recipe.head):,} parameters; {_tokens(recipe)}; "
            f"{check_layout(recipe)}{_beside(recipe)}"
        )
        return 0
    with training_progress(_num_steps(recipe)) as watch:
        finished = kind.train(
            recipe,
            options.workdir,
            init_from=options.init_from,
            profile=profile,
            watch=watch,
        )
    if not finished:
        print("Saved and stopped as asked; the same command goes on from here.")
        return EXIT_PREEMPTED
    print(f"Done. {_what_next(recipe, options.workdir)}")
    return 0


def _beside(recipe: TrainingRecipe) -> str:
    """What a device holds beside the state that is counted."""
    if isinstance(recipe, PpoRecipe):
        return " for the policy, as much for the critic, and three models to read"
    return ""


def _what_next(recipe: TrainingRecipe, workdir: str) -> str:
    if isinstance(recipe, RewardRecipe):
        return f"Score with it: llama_jax.finetune.reward.load_reward({workdir!r})"
    if isinstance(recipe, PpoRecipe):
        best = best_policy(workdir, recipe.ppo.patience, recipe.ppo.max_kl)
        return f"Talk to it: llama-jax chat {best}"
    if isinstance(recipe, SftRecipe):
        return f"Talk to it: llama-jax chat {workdir}"
    return f"Let it write: llama-jax generate {workdir} --prompt The"


def _num_steps(recipe: TrainingRecipe) -> int:
    """For the bar. What is wrong with the data the run will say, on all hosts."""
    if recipe.train.num_steps:
        return recipe.train.num_steps
    try:
        num_rows = num_training_rows(open_data(recipe.data))
    except (DataError, KeyError):
        return 0
    return recipe.with_steps(num_rows).train.num_steps


def _tokens(recipe: TrainingRecipe) -> str:
    a_step = recipe.train.batch_size * recipe.data.sequence_length
    if isinstance(recipe, EpochRecipe) and recipe.epochs is not None:
        return f"{a_step:,} tokens a step, {recipe.epochs} epochs"
    return f"{a_step:,} tokens a step, {a_step * recipe.train.num_steps:,} in all"


def _first_and_last(steps: str | None) -> tuple[int, int] | None:
    if steps is None:
        return None
    first, colon, last = steps.partition(":")
    last = last if colon else first
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise RecipeError(
            f"--profile {steps}: give the first and the last step, as 10:12."
        )
    return int(first), int(last)
