"""Whether mesh, model and batch of a recipe divide; found out without the devices."""

import math

import jax
import jax.numpy as jnp

from llama_jax.build import params_layout
from llama_jax.config.recipe import TrainingRecipe
from llama_jax.model.count import abstract_params
from llama_jax.model.flash import Blocks
from sharding import ShardingError, abstract_mesh, context, training_rules
from sharding.axes import BATCH, SEQUENCE, VOCAB
from sharding.mesh import AnyMesh, axis_size


def check_layout(recipe: TrainingRecipe) -> str:
    """Whether mesh, model and batch divide, without the devices; and what each holds.

    Raises:
      ShardingError: they do not; says which number, and what would do.
      ConfigError: rows do not divide into the tiles of the attention kernel.
    """
    num_devices = recipe.num_devices or jax.device_count()
    mesh = abstract_mesh(recipe.mesh, num_devices)
    require_division(recipe, mesh)
    rules = training_rules(sequence_parallel=recipe.sequence_parallel)
    shapes = abstract_params(recipe.model, recipe.head)
    layout = params_layout(recipe.model, mesh, rules, recipe.head)
    held = sum(
        math.prod(leaf_layout.shard_shape(leaf.shape))
        for leaf, leaf_layout in zip(
            jax.tree.leaves(shapes), jax.tree.leaves(layout), strict=True
        )
    )
    # Parameters are float32, and Adam has two moments of each.
    held *= 4 + 2 * jnp.dtype(recipe.optimizer.moments).itemsize
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return (
        f"mesh {sizes} on {recipe.topology or 'the devices here'}; "
        f"{held / 2**30:.2f} GiB of state a device"
    )


def require_division(recipe: TrainingRecipe, mesh: AnyMesh) -> None:
    """Check that batch, rows, vocabulary and tiles divide over a mesh.

    Raises:
      ShardingError: they do not; says which number, and what would do.
      ConfigError: rows do not divide into the tiles of the attention kernel.
    """
    _require_rows_divide(recipe, mesh)
    _require_chunks_divide(recipe, mesh)
    _require_tiles_divide(recipe, mesh)


def _require_rows_divide(recipe: TrainingRecipe, mesh: AnyMesh) -> None:
    rules = training_rules(sequence_parallel=recipe.sequence_parallel)
    context.require_positions_divide(mesh, rules, recipe.data.sequence_length)
    parts = axis_size(mesh, rules.mesh_axes(BATCH)) * recipe.train.accumulate
    if recipe.train.batch_size % parts:
        raise ShardingError(
            f"train.batch_size {recipe.train.batch_size} does not divide over "
            f"{parts} = {' x '.join(rules.mesh_axes(BATCH))} of the mesh "
            f"{dict(mesh.shape)} x accumulate {recipe.train.accumulate}: choose a "
            f"multiple of {parts}."
        )
    if axis_size(mesh, rules.mesh_axes(BATCH)) % jax.process_count():
        raise ShardingError(
            f"{' x '.join(rules.mesh_axes(BATCH))} of the mesh {dict(mesh.shape)} do "
            f"not split the batch over {jax.process_count()} hosts, each of which "
            "reads rows of its own: keep tensor and context within a host's chips."
        )


def _require_chunks_divide(recipe: TrainingRecipe, mesh: AnyMesh) -> None:
    rules = training_rules(sequence_parallel=recipe.sequence_parallel)
    pieces = recipe.model.vocab_size // axis_size(mesh, rules.mesh_axes(VOCAB))
    if pieces % recipe.train.loss_chunks:
        fits = [n for n in range(1, 129) if pieces % n == 0]
        raise ShardingError(
            f"train.loss_chunks {recipe.train.loss_chunks} does not divide the "
            f"{pieces} pieces of the vocabulary on each device of mesh axes "
            f"{' x '.join(rules.mesh_axes(VOCAB))}: choose it from {fits}."
        )


def _require_tiles_divide(recipe: TrainingRecipe, mesh: AnyMesh) -> None:
    rules = training_rules(sequence_parallel=recipe.sequence_parallel)
    parts = axis_size(mesh, rules.mesh_axes(SEQUENCE))
    ring = parts > 1 and recipe.train.context_attention == "ring"
    if recipe.train.attention == "splash" and not ring:
        Blocks().within(recipe.data.sequence_length // parts)
