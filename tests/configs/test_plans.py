"""Every pretraining recipe, compiled for its pod, fits it; so does PPO (`make plan`).

Some minutes each the first time; compiled steps are kept on disk. Cases whose id
begins with `ci-` are one for each generation of chips: `-m plan -k ci-llama2`.
"""

from pathlib import Path

import pytest

from llama_jax.config.recipe import load_recipe, recipe_names
from llama_jax.planning import report
from llama_jax.planning.estimate import estimate
from llama_jax.planning.plan import plan
from llama_jax.planning.ppo import plan_ppo

FOLDER = Path(__file__).parents[2] / "configs" / "pretrain"
PLACES = [
    f"{file}:{name}"
    for file in sorted(FOLDER.glob("*.py"))
    for name in recipe_names(file)
]


def _one_per_chip() -> set[str]:
    """The recipe of each chip that compiles soonest: the smallest model."""
    chosen: dict[str, tuple[int, str]] = {}
    for place in PLACES:
        recipe = load_recipe(place)
        chip = recipe.topology.split(":")[0]
        size = (recipe.model.num_layers * recipe.model.dim, place)
        if recipe.mesh.num_slices == 1:
            chosen[chip] = min(chosen.get(chip, size), size)
    return {place for _, place in chosen.values()}


CI = _one_per_chip()


def test_ci_compiles_for_every_chip_that_recipes_are_for():
    chips = {load_recipe(place).topology.split(":")[0] for place in PLACES}
    assert {load_recipe(place).topology.split(":")[0] for place in CI} == chips
    assert chips >= {"v4", "v5e", "v5p", "v6e"}


@pytest.mark.plan
@pytest.mark.parametrize(
    "place",
    PLACES,
    ids=lambda place: ("ci-" if place in CI else "") + Path(place).name,
)
def test_recipe_fits_its_pod(place):
    planned = plan(place)
    assert planned.source == "compiled"
    assert planned.fits, f"{report.verdict(planned)} {report.remedies(planned)}"
    assert planned.mfu is not None and 0.1 < planned.mfu < 0.8
    # The closed form that prunes searches stays near what it stands for.
    guessed = estimate(planned.recipe, planned.topology)
    assert guessed.memory["parameters"] == planned.memory["parameters"]
    assert 0.6 < guessed.hbm_bytes / planned.hbm_bytes < 1.5
    assert 0.6 < guessed.step_seconds / planned.step_seconds < 1.6


@pytest.mark.plan
@pytest.mark.parametrize("size", ["7b", "70b"])
def test_five_models_fit_their_slice(size):
    learning = plan(f"{FOLDER.parent}/chat/llama2_{size}.py:ppo")
    assert learning.source == "compiled"
    assert learning.fits, report.verdict(learning)
    planned = plan_ppo(learning, compiles=True)
    assert planned.fits, report.ppo_verdict(planned)
    assert planned.writing.copied_bytes == 0
    _, values, scores = planned.reading
    # Both reward models have the kernel that the critic has.
    assert scores.seconds < 2.3 * values.seconds
    # As many layers as the policy's step, and no logits.
    assert 0.9 < planned.critic_seconds / planned.policy_seconds < 1.02
    assert planned.critic_bytes < learning.hbm_bytes
    # Prompts of half a row are read in less time than answers of half are written.
    assert planned.writing.chunk_bytes < planned.writing_bytes < learning.hbm_limit
    assert planned.writing.chunk_seconds < 256 * planned.writing.token_seconds
    guessed = estimate(learning.recipe, learning.topology)
    assert 0.6 < guessed.hbm_bytes / learning.hbm_bytes < 1.5
