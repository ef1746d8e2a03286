"""Every recipe in configs/ loads, divides, and holds its state in a chip's memory."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from llama_jax.config.recipe import (
    TrainingRecipe,
    differences,
    load_recipe,
    recipe_names,
    to_json,
)
from llama_jax.errors import ConfigError, RecipeError
from llama_jax.model import num_params
from llama_jax.train.layout import check_layout
from tests import runs

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs").rglob("*.py"))
PLACES = [f"{file}:{name}" for file in FILES for name in recipe_names(file)]
HBM_GIB = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}
# Parameter, gradient and two moments, float32.
BYTES_PER_PARAM = 16


def test_there_are_recipes_for_every_size():
    assert len(PLACES) >= 13
    assert {file.stem for file in FILES} >= {
        f"llama2_{size}" for size in ("7b", "13b", "34b", "70b")
    }


@pytest.mark.parametrize("place", PLACES, ids=lambda p: str(Path(p).name))
def test_recipe_resolves_and_fits(place):
    recipe = load_recipe(place)
    assert isinstance(recipe, TrainingRecipe)
    assert "GiB of state a device" in check_layout(recipe)
    json.dumps(to_json(recipe))
    if recipe.topology:
        chip = recipe.topology.split(":")[0]
        mesh = recipe.mesh.resolve(recipe.num_devices)
        parts = math.prod((mesh.fsdp, mesh.tensor, mesh.dcn_fsdp))
        held = num_params(recipe.model) * BYTES_PER_PARAM / parts / 2**30
        assert held < 0.5 * HBM_GIB[chip]


@pytest.mark.parametrize("place", [p for p in PLACES if "pretrain" in p], ids=str)
def test_paper_recipes_have_the_papers_numbers(place):
    recipe = load_recipe(place)
    large = "34b" in place or "70b" in place
    assert recipe.optimizer.peak_lr == (1.5e-4 if large else 3e-4)
    assert recipe.optimizer.warmup_steps == 2000
    assert (recipe.optimizer.beta1, recipe.optimizer.beta2) == (0.9, 0.95)
    assert recipe.optimizer.eps == 1e-5
    assert recipe.optimizer.final_lr_fraction == 0.1
    assert (recipe.optimizer.weight_decay, recipe.optimizer.clip_norm) == (0.1, 1.0)
    tokens = recipe.train.batch_size * recipe.data.sequence_length
    assert tokens in (2**19, 2**20, 2**21, 2**22)
    assert 2e12 <= recipe.train.num_steps * tokens < 2e12 + tokens
    if place.endswith("x4"):
        assert tokens == 2**22


def test_remat_of_more_layers_than_there_are_is_refused():
    recipe = load_recipe("configs/pretrain/llama2_7b.py:v5p_128")
    train = dataclasses.replace(recipe.train, remat="projections:32,full")
    with pytest.raises(ConfigError, match="names 32 layers .* model.num_layers is 32"):
        dataclasses.replace(recipe, train=train)


def write(tmp_path, text):
    path = tmp_path / "recipes and spaces.py"
    path.write_text(text)
    return path


def test_places_that_name_no_recipe(tmp_path):
    with pytest.raises(RecipeError, match="FILE.py:FUNCTION"):
        load_recipe("configs/demo.py")
    with pytest.raises(RecipeError, match=r"configs/dmo.py does not exist"):
        load_recipe("configs/dmo.py:small")
    with pytest.raises(RecipeError, match=r"Did you mean 'small'\?"):
        load_recipe(f"{ROOT}/configs/demo.py:smal")
    path = write(tmp_path, "def one():\n    return 1\n")
    with pytest.raises(RecipeError, match="returned int, which is no recipe"):
        load_recipe(f"{path}:one")
    path = write(tmp_path, "import nothing_of_this_name\n")
    with pytest.raises(RecipeError, match=r"ModuleNotFoundError: .*nothing_of_this"):
        load_recipe(f"{path}:one")
    path = write(tmp_path, "def one(:\n")
    with pytest.raises(RecipeError, match="SyntaxError"):
        load_recipe(f"{path}:one")


def test_sequences_must_fit_the_model():
    recipe = runs.recipe("data")
    with pytest.raises(ConfigError, match=r"sequence_length 129 exceeds .*128"):
        runs.changed(recipe, "data", sequence_length=129)


def test_topologies():
    recipe = load_recipe(f"{ROOT}/configs/pretrain/llama2_7b.py:v5p_128")
    assert recipe.num_devices == 64
    assert runs.recipe("data").num_devices is None
    with pytest.raises(ConfigError, match=r"topology is 'v5p-128': write a chip"):
        import dataclasses

        dataclasses.replace(recipe, topology="v5p-128")


def test_differences_are_told_field_by_field():
    recipe = runs.recipe("data")
    saved = json.loads(json.dumps(to_json(recipe)))
    assert differences(saved, recipe) == {}
    other = runs.changed(recipe, "optimizer", peak_lr=1.0)
    assert differences(saved, other) == {"optimizer.peak_lr": "0.01, now 1.0"}
    del saved["train"]["seed"]
    assert differences(saved, recipe) == {"train.seed": "absent, now 0"}
