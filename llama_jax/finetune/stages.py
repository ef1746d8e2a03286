"""Which stage a recipe is of: its type says it."""

from collections.abc import Mapping

from llama_jax.config.recipe import (
    PretrainRecipe,
    RewardRecipe,
    SftRecipe,
    TrainingRecipe,
)
from llama_jax.finetune import reward, sft
from llama_jax.train import pretrain
from llama_jax.train.run import Stage

STAGES: Mapping[type[TrainingRecipe], Stage] = {
    PretrainRecipe: pretrain.STAGE,
    SftRecipe: sft.STAGE,
    RewardRecipe: reward.STAGE,
}


def stage_of(recipe: TrainingRecipe) -> Stage:
    """The stage of a recipe."""
    (stage,) = (stage for kind, stage in STAGES.items() if isinstance(recipe, kind))
    return stage
