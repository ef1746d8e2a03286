"""Architecture + mesh -> a model whose parts know where they live."""

import dataclasses

import jax
import jax.numpy as jnp

from llama_jax.config import LlamaConfig
from llama_jax.config.train import Remat
from llama_jax.model import Llama, layers, param_axes
from llama_jax.model.count import abstract_params
from llama_jax.model.transformer import Attend
from sharding import (
    AxisRules,
    array_sharding,
    born_sharded,
    constrain,
    param_shardings,
)
from sharding.axes import Tree


@dataclasses.dataclass(frozen=True)
class ShardedLlama:
    """A `Llama`, the mesh it runs on and the layout of its parameters.

    Programs that use it are traced and called inside `jax.set_mesh(mesh)`.

    Attributes:
      model: functional; `model.apply({"params": params}, tokens)`.
      mesh: the devices.
      rules: logical axes to mesh axes.
      param_shardings: a sharding per parameter, shaped like the parameters.
    """

    model: Llama
    mesh: jax.sharding.Mesh
    rules: AxisRules
    param_shardings: Tree

    @property
    def config(self) -> LlamaConfig:
        """The architecture."""
        return self.model.config

    def init(self, seed: int) -> Tree:
        """Fresh float32 parameters, each part made on the device that keeps it.

        The same values on every mesh.
        """

        def init(key: jax.Array) -> Tree:
            unplaced = Llama(self.config)
            return unplaced.init(key, jnp.zeros((1, 1), jnp.int32))["params"]

        with jax.set_mesh(self.mesh):
            return born_sharded(init, self.param_shardings)(jax.random.key(seed))

    def sharding(self, *names: str | None) -> jax.sharding.NamedSharding:
        """The layout of an array whose dimensions have these logical axes."""
        return array_sharding(self.rules, self.mesh, *names)


def build(
    config: LlamaConfig,
    mesh: jax.sharding.Mesh,
    rules: AxisRules,
    *,
    dtype: jnp.dtype | str,
    remat: Remat,
    attend: Attend = layers.attend,
) -> ShardedLlama:
    """Put a Llama on a mesh.

    Args:
      config: the architecture.
      mesh: the devices; one device is a mesh too.
      rules: which mesh axes split which logical axis.
      dtype: what the arithmetic is done in.
      remat: what the backward pass finds saved, see `model.depth.run`.
      attend: the attention kernel.

    Raises:
      ShardingError: the mesh does not divide the model; says what would.
    """
    names = param_axes()
    return ShardedLlama(
        model=Llama(
            config,
            constrain=constrain(rules, mesh),
            attend=attend,
            dtype=jnp.dtype(dtype),
            remat=remat,
        ),
        mesh=mesh,
        rules=rules,
        param_shardings=param_shardings(rules, mesh, names, abstract_params(config)),
    )
