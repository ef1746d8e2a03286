"""Recipes that tests plan, from configs/."""

import dataclasses

from llama_jax.config.recipe import PretrainRecipe
from llama_jax.planning.energy import Power
from llama_jax.planning.plan import Plan, estimated, resolve
from sharding import MeshConfig
from tests.architecture.tree import ROOT

PRETRAIN = ROOT / "configs" / "pretrain"
V5P_64 = f"{PRETRAIN}/llama2_7b.py:v5p_128"
V5P_128 = f"{PRETRAIN}/llama2_70b.py:v5p_256"
POWER = Power(watts_per_chip=500)


def changed(
    recipe: PretrainRecipe, *, mesh: MeshConfig | None = None, **train: object
) -> PretrainRecipe:
    """With another mesh, or other fields of `train`."""
    return dataclasses.replace(
        recipe,
        mesh=mesh or recipe.mesh,
        train=dataclasses.replace(recipe.train, **train),
    )


def closed_form(place: str, **train: object) -> Plan:
    """The estimate of a recipe, on its own topology."""
    recipe, topology = resolve(place, None, None)
    return estimated(changed(recipe, **train), topology, POWER)
