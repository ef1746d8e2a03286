"""A recipe so small that a test can run it, and what its runs leave behind."""

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from llama_jax.config import LlamaConfig
from llama_jax.config.data import DataConfig
from llama_jax.config.finetune import PpoConfig, RewardConfig
from llama_jax.config.recipe import (
    PpoRecipe,
    PretrainRecipe,
    RewardRecipe,
    SftRecipe,
    TrainingRecipe,
    paper_optimizer,
)
from llama_jax.config.train import TrainConfig
from sharding import MeshConfig
from tests.data import corpus

NUM_STEPS = 8

Recipe = TypeVar("Recipe", bound=TrainingRecipe)


def recipe(data: str | Path, *, mesh: MeshConfig | None = None) -> PretrainRecipe:
    """Eight steps of eight rows; validation and a checkpoint at every fourth."""
    return PretrainRecipe(
        model=dataclasses.replace(LlamaConfig.tiny(), vocab_size=400),
        data=DataConfig(paths=(str(data),), sequence_length=corpus.LENGTH, seed=1),
        optimizer=paper_optimizer(peak_lr=1e-2, warmup_steps=2),
        train=TrainConfig(
            num_steps=NUM_STEPS,
            batch_size=8,
            accumulate=1,
            compute_dtype="float32",
            remat="none",
            seed=0,
            validate_every=4,
            checkpoint_every=4,
            keep_latest=2,
            keep_period=0,
            on_bad_step="stop",
        ),
        mesh=mesh or MeshConfig(fsdp=4, tensor=2),
        sequence_parallel=False,
        topology="",
    )


def sft_recipe(data: str | Path, length: int) -> SftRecipe:
    """Three epochs of eight rows a step, each of so many tokens."""
    like = recipe(data)
    return SftRecipe(
        model=like.model,
        data=dataclasses.replace(like.data, sequence_length=length, segments=True),
        optimizer=like.optimizer,
        train=dataclasses.replace(like.train, num_steps=0),
        mesh=like.mesh,
        sequence_parallel=False,
        topology="",
        epochs=3,
    )


def reward_recipe(data: str | Path, length: int) -> RewardRecipe:
    """Three epochs likewise, with a small margin and half of the safety loss."""
    like = sft_recipe(data, length)
    fields = {f.name: getattr(like, f.name) for f in dataclasses.fields(like)}
    return RewardRecipe(
        **fields, reward=RewardConfig(margin="small", safety_weight=0.5)
    )


def ppo_recipe(
    data: str | Path, length: int, *, helpfulness: str | Path, safety: str | Path
) -> PpoRecipe:
    """Two iterations of four steps; validation and a checkpoint after each."""
    like = recipe(data)
    return PpoRecipe(
        model=like.model,
        data=dataclasses.replace(like.data, sequence_length=length),
        optimizer=dataclasses.replace(
            paper_optimizer(peak_lr=1e-2, warmup_steps=0), final_lr_fraction=1.0
        ),
        train=like.train,
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        sequence_parallel=False,
        topology="",
        ppo=PpoConfig(
            helpfulness=str(helpfulness),
            safety=str(safety),
            critic="helpfulness",
            threshold=0.15,
            beta=0.01,
            prompts=32,
            max_new_tokens=12,
            temperature=1.0,
            clip=0.2,
            value_clip=0.2,
            gamma=1.0,
            lam=0.95,
            patience=None,
            decode_tensor=2,
            decode_batch=16,
        ),
    )


def changed(recipe: Recipe, part: str, **values: Any) -> Recipe:
    """The recipe with fields of one of its parts changed."""
    new = dataclasses.replace(getattr(recipe, part), **values)
    return dataclasses.replace(recipe, **{part: new})


def saved(workdir: Path, step: int, item: str = "params") -> dict[str, np.ndarray]:
    """The arrays of a checkpoint, by name, read by plain Orbax on the host."""
    directory = workdir / "checkpoints" / str(step) / item
    arrays: dict[str, np.ndarray] = {}

    def collect(tree: Any, name: str) -> None:
        if isinstance(tree, dict):
            for key, value in tree.items():
                collect(value, f"{name}/{key}")
        elif isinstance(tree, list | tuple):
            for key, value in enumerate(tree):
                collect(value, f"{name}/{key}")
        elif tree is not None:
            arrays[name] = np.asarray(tree)

    with ocp.PyTreeCheckpointer() as checkpointer:
        # Whatever the devices were that saved it, of however many hosts.
        as_numpy = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
            checkpointer.metadata(directory).item_metadata.tree,
        )
        restored = checkpointer.restore(
            directory, ocp.args.PyTreeRestore(restore_args=as_numpy)
        )
        collect(restored, "")
    return arrays


def require_equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
