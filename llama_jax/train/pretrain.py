"""Pretraining: next tokens of documents (section 2)."""

from collections.abc import Callable

from etils import epath

from llama_jax.config.recipe import PretrainRecipe
from llama_jax.train.metrics import Record
from llama_jax.train.run import Stage, run

STAGE = Stage(reads="documents", needs_model=False)


def pretrain(
    recipe: PretrainRecipe,
    workdir: epath.PathLike,
    *,
    init_from: epath.PathLike | None = None,
    profile: tuple[int, int] | None = None,
    watch: Callable[[Record], None] = lambda record: None,
) -> bool:
    """Run a recipe, or go on with it.

    It begins, in this order of preference, with the newest checkpoint in `workdir`,
    with the parameters of `init_from`, or with fresh ones.

    Args:
      recipe: all of the run.
      workdir: gets checkpoints, metrics and the tokenizer.
      init_from: any checkpoint that `llama_jax.load` reads.
      profile: first and last step to trace with `jax.profiler`.
      watch: called with every record of `metrics.jsonl`.

    Returns:
      True at the end of the recipe; False if it was asked to stop before, with all
      saved.

    Raises:
      LlamaError: see `llama_jax.errors`.
      ShardingError: mesh, model, batch and devices do not fit one another.

    On several hosts an error ends the process, with its message and status 1, and the
    loss of another host with `faults.EXIT_HOST_LOST`.
    """
    return run(
        STAGE, recipe, workdir, init_from=init_from, profile=profile, watch=watch
    )
