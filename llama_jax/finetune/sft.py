"""Supervised fine-tuning: answers of dialogs (section 3.1)."""

from collections.abc import Callable

from etils import epath

from llama_jax.config.recipe import SftRecipe
from llama_jax.train.metrics import Record
from llama_jax.train.run import Stage, run

STAGE = Stage(reads="dialogs", needs_model=True)


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
        STAGE, recipe, workdir, init_from=init_from, profile=profile, watch=watch
    )
