"""Which stage a recipe is of: its type says it."""

from collections.abc import Mapping

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
from llama_jax.finetune import ppo, reward, sft
from llama_jax.train import pretrain
from llama_jax.train.run import Stage

STAGES: Mapping[type[TrainingRecipe], Stage] = {
    PretrainRecipe: pretrain.STAGE,
    SftRecipe: sft.STAGE,
    RewardRecipe: reward.STAGE,
    PpoRecipe: ppo.STAGE,
}


def stage_of(recipe: TrainingRecipe) -> Stage:
    """The stage of a recipe; of PPO, that of the policy."""
    (stage,) = (stage for kind, stage in STAGES.items() if isinstance(recipe, kind))
    return stage


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
        stage_of(recipe).reads,
        length=length,
        bos_id=0 if recipe.data.segments else None,  # any: these rows are empty
    )
    return to_batch([np.empty(0, np.int32)] * rows)
