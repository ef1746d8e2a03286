"""Supervised fine-tuning: answers of dialogs (section 3.1)."""

from collections.abc import Callable

from etils import epath

from llama_jax.config.recipe import SftRecipe
from llama_jax.data import open_data
from llama_jax.data.prepare import TRAIN
from llama_jax.train.metrics import Record
from llama_jax.train.run import Stage, run

_STAGE = Stage("supervised fine-tuning", reads="dialogs", needs_model=True)


def sft(
    recipe: SftRecipe,
    workdir: epath.PathLike,
    *,
    init_from: epath.PathLike | None = None,
    profile: tuple[int, int] | None = None,
    watch: Callable[[Record], None] = lambda record: None,
) -> bool:
    """Teach a model to answer, or go on with that.

    The loss is that of answers alone, each with the EOS that ends it. Arguments,
    result and errors are those of `train.pretrain.pretrain`; but the parameters come
    from `init_from`, or from the newest checkpoint in `workdir`.

    Raises:
      CheckpointError: there is neither.
      DataError: the data are documents, not dialogs.
    """
    return run(
        _STAGE,
        with_steps(recipe),
        workdir,
        init_from=init_from,
        profile=profile,
        watch=watch,
    )


def with_steps(recipe: SftRecipe) -> SftRecipe:
    """The recipe with the steps that its epochs need.

    Raises:
      DataError: the data are missing, damaged or do not fit; see `data.open_data`.
    """
    if recipe.epochs is None:
        return recipe
    sets = open_data(recipe.data)
    return recipe.with_steps(sum(data.splits[TRAIN].num_rows for data in sets))
