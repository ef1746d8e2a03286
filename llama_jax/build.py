"""Architecture + mesh -> a model whose parts know where they live."""

import dataclasses

import jax
import jax.numpy as jnp

from llama_jax.config import LlamaConfig
from llama_jax.config.model import Head
from llama_jax.config.recipe import TrainingRecipe
from llama_jax.config.train import TrainConfig
from llama_jax.model import Llama, flash, layers, param_axes, tiles
from llama_jax.model.count import abstract_params
from llama_jax.model.heads import MODELS
from llama_jax.model.ring import GatheredAttention, RingAttention
from llama_jax.model.transformer import Attend
from sharding import (
    AxisRules,
    ShardingError,
    array_sharding,
    axes,
    born_sharded,
    constrain,
    param_shardings,
    training_rules,
)
from sharding.axes import Tree
from sharding.mesh import AnyMesh, axis_size


@dataclasses.dataclass(frozen=True)
class ShardedLlama:
    """A `Llama`, the mesh it runs on and the layout of its parameters.

    Programs that use it are traced and called inside `jax.set_mesh(mesh)`.

    Attributes:
      model: functional; `model.apply({"params": params}, tokens)`.
      mesh: the devices.
      rules: logical axes to mesh axes.
      param_shardings: a sharding per parameter, shaped like the parameters.
      loss_chunks: parts of the vocabulary that training works its loss off in.
    """

    model: Llama
    mesh: jax.sharding.Mesh
    rules: AxisRules
    param_shardings: Tree
    loss_chunks: int = 1

    @property
    def config(self) -> LlamaConfig:
        """The architecture."""
        return self.model.config

    @property
    def head(self) -> Head:
        """What the model ends with."""
        return self.model.head

    @property
    def mlp_parts(self) -> int:
        """Devices that share the feed-forward width."""
        return axis_size(self.mesh, self.rules.mesh_axes(axes.MLP))

    def init(self, seed: int) -> Tree:
        """Fresh float32 parameters, each part made on the device that keeps it.

        The same values on every mesh.
        """
        with jax.set_mesh(self.mesh):
            return born_sharded(self._init, self.param_shardings)(jax.random.key(seed))

    def init_head(self, seed: int) -> Tree:
        """Those of `init` that the model ends with, alone."""

        def init(key: jax.Array) -> Tree:
            return self._init(key)[self.head]  # the compiler drops all the others

        with jax.set_mesh(self.mesh):
            make = born_sharded(init, self.param_shardings[self.head])
            return make(jax.random.key(seed))

    def _init(self, key: jax.Array) -> Tree:
        unplaced = MODELS[self.head](self.config)
        return unplaced.init(key, jnp.zeros((1, 1), jnp.int32))["params"]

    def sharding(self, *names: str | None) -> jax.sharding.NamedSharding:
        """The layout of an array whose dimensions have these logical axes."""
        return array_sharding(self.rules, self.mesh, *names)


def build(
    config: LlamaConfig,
    mesh: jax.sharding.Mesh,
    rules: AxisRules,
    *,
    dtype: jnp.dtype | str,
    remat: str,
    attend: Attend = layers.attend,
    loss_chunks: int = 1,
    head: Head = "unembed",
) -> ShardedLlama:
    """Put a Llama on a mesh.

    Args:
      config: the architecture.
      mesh: the devices; one device is a mesh too.
      rules: which mesh axes split which logical axis.
      dtype: what the arithmetic is done in.
      remat: what the backward pass finds saved, see `model.depth.run`.
      attend: the attention kernel.
      loss_chunks: parts of the vocabulary that training works its loss off in.
      head: what the model ends with.

    Raises:
      ShardingError: the mesh does not divide the model; says what would.
    """
    return ShardedLlama(
        model=MODELS[head](
            config,
            constrain=constrain(rules, mesh),
            attend=attend,
            dtype=jnp.dtype(dtype),
            remat=remat,
            kv_copies=kv_copies(config, mesh, rules),
        ),
        mesh=mesh,
        rules=rules,
        param_shardings=params_layout(config, mesh, rules, head),
        loss_chunks=loss_chunks,
    )


def params_layout(
    config: LlamaConfig, mesh: AnyMesh, rules: AxisRules, head: Head = "unembed"
) -> Tree:
    """A sharding per parameter.

    Raises:
      ShardingError: the mesh does not divide the model; says what would.
    """
    if kv_copies(config, mesh, rules) > 1:
        # The weights stay whole, and each device takes the head that it needs.
        rules = dataclasses.replace(rules, kv_heads=())
    shapes = abstract_params(config, head)
    return param_shardings(rules, mesh, param_axes(head), shapes)


def kv_copies(config: LlamaConfig, mesh: AnyMesh, rules: AxisRules) -> int:
    """Devices that compute each key/value head: more than 1 where heads are fewer.

    Raises:
      ShardingError: neither the heads nor the devices are a multiple of the other, or
        the query heads do not divide.
    """
    N, K = config.num_heads, config.num_kv_heads
    split = rules.mesh_axes(axes.KV_HEADS)
    parts = axis_size(mesh, split)
    fit = [t for t in range(1, N + 1) if N % t == 0 and (K % t == 0 or t % K == 0)]
    if parts not in fit:
        raise ShardingError(
            f"the {parts} devices of mesh axes {' x '.join(split)} do not share "
            f"num_heads {N} and num_kv_heads {K} evenly: choose a mesh where they "
            f"multiply to one of {fit}."
        )
    return max(1, parts // K)


def build_for(recipe: TrainingRecipe, mesh: jax.sharding.Mesh) -> ShardedLlama:
    """The model that a recipe trains, with its kernels.

    Raises:
      ShardingError: the mesh does not divide the model; says what would.
    """
    rules = training_rules(sequence_parallel=recipe.sequence_parallel)
    return build(
        recipe.model,
        mesh,
        rules,
        dtype=recipe.train.compute_dtype,
        remat=recipe.train.remat,
        attend=_attention(recipe.train, mesh, rules),
        loss_chunks=recipe.train.loss_chunks,
        head=recipe.head,
    )


def _attention(
    settings: TrainConfig, mesh: jax.sharding.Mesh, rules: AxisRules
) -> Attend:
    splash = settings.attention == "splash"
    split = rules.mesh_axes(axes.SEQUENCE)
    if axis_size(mesh, split) == 1:
        if splash:
            return flash.FlashAttention(mesh=mesh, rules=rules)
        return layers.attend
    if settings.context_attention == "ring":
        return RingAttention(mesh=mesh, rules=rules)
    inner = flash.FlashPart(axis=split[0]) if splash else tiles.attend
    return GatheredAttention(mesh=mesh, rules=rules, inner=inner)
