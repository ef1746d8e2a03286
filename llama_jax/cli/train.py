"""`llama-jax train RECIPE`: run a recipe, or go on with it."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from llama_jax.cli.progress import training_progress
from llama_jax.config.recipe import PretrainRecipe, load_recipe, to_json
from llama_jax.errors import RecipeError
from llama_jax.model.count import num_params
from llama_jax.train.faults import EXIT_PREEMPTED
from llama_jax.train.pretrain import check_layout, pretrain

_USAGE = """\
usage: llama-jax train RECIPE [options]

RECIPE is FILE.py:FUNCTION, as configs/demo.py:small. Each field of a recipe is an
option: `llama-jax train RECIPE --help` lists them with the recipe's own values.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
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
    fields: Annotated[PretrainRecipe, tyro.conf.arg(name="")]


def run(argv: Sequence[str]) -> int:
    """The command; returns the exit status."""
    if not argv or argv[0].startswith("-"):
        asked = "--help" in argv or "-h" in argv
        print(_USAGE, end="", file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    options = tyro.cli(
        Options,
        args=argv,
        prog="llama-jax train",
        default=Options(recipe=argv[0], fields=load_recipe(argv[0])),
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    recipe = options.fields
    profile = _first_and_last(options.profile)
    if options.dry_run:
        print(json.dumps(to_json(recipe), indent=2))
        train = recipe.train
        print(
            f"{num_params(recipe.model):,} parameters; "
            f"{train.batch_size * recipe.data.sequence_length:,} tokens a step, "
            f"{train.batch_size * recipe.data.sequence_length * train.num_steps:,} "
            f"in all; {check_layout(recipe)}"
        )
        return 0
    with training_progress(recipe.train.num_steps) as watch:
        finished = pretrain(
            recipe,
            options.workdir,
            init_from=options.init_from,
            profile=profile,
            watch=watch,
        )
    if not finished:
        print("Saved and stopped as asked; the same command goes on from here.")
        return EXIT_PREEMPTED
    print(f"Done. Let it write: llama-jax generate {options.workdir} --prompt 'The'")
    return 0


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
