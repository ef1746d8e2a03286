"""Which stage a recipe is of: its type says it."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from llama_jax.config.recipe import (
    PpoRecipe,
    PretrainRecipe,
    RewardRecipe,
    SftRecipe,
    TrainingRecipe,
)
from llama_jax.data import Experience
from llama_jax.data.batch import AnyBatch, batches_of
from llama_jax.errors import RecipeError
from llama_jax.finetune import ppo, reward, sft
from llama_jax.train import pretrain
from llama_jax.train.run import Stage


class Kind(NamedTuple):
    """What a type of recipe is for.

    Attributes:
      recipe: the type.
      stage: what its runs read, and what they make small; of PPO, the policy's.
      train: does a run, or goes on with it: see `train.pretrain.pretrain`.
    """

    recipe: type[TrainingRecipe]
    stage: Stage
    train: Callable[..., bool]


KINDS = (
    Kind(PretrainRecipe, pretrain.STAGE, pretrain.pretrain),
    Kind(SftRecipe, sft.STAGE, sft.sft),
    Kind(RewardRecipe, reward.STAGE, reward.train_reward),
    Kind(PpoRecipe, ppo.STAGE, ppo.ppo),
)


def kind_of(recipe: TrainingRecipe) -> Kind:
    """What a recipe is for.

    Raises:
      RecipeError: it is of no such type.
    """
    for kind in KINDS:
        if isinstance(recipe, kind.recipe):
            return kind
    types = ", ".join(kind.recipe.__name__ for kind in KINDS)
    raise RecipeError(f"{type(recipe).__name__} has no stage: return one of {types}.")


def empty_batch(recipe: TrainingRecipe) -> AnyBatch:
    """What a step of a recipe reads, all of it padding."""
    rows, length = recipe.train.batch_size, recipe.data.sequence_length
    if isinstance(recipe, PpoRecipe):
        ids = np.zeros((rows, length), np.int32)
        numbers = np.zeros((rows, length), np.float32)
        return Experience(
            tokens=ids,
            targets=ids,
            mask=numbers,
            logprobs=numbers,
            advantages=numbers,
            values=numbers,
            returns=numbers,
        )
    to_batch = batches_of(
        kind_of(recipe).stage.reads,
        length=length,
        bos_id=0 if recipe.data.segments else None,  # any: these rows are empty
    )
    return to_batch([np.empty(0, np.int32)] * rows)
