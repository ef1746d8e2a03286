"""A Llama that gives one number at each position: reward models, and PPO's critic.

Suffixes as in `layers.py`.
"""

from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from llama_jax.config.model import Head
from llama_jax.model.transformer import INIT, Llama
from sharding import axes


class Scalar(nn.Module):
    """The linear map from the residual stream to one number, in float32."""

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T"]:
        """The number at each position."""
        kernel_D = self.param("kernel", INIT, (x_BTD.shape[-1],)).astype(jnp.float32)
        x_BTD = x_BTD.astype(jnp.float32)
        return jnp.einsum("BTD,D->BT", x_BTD, kernel_D, precision="highest")


class ScalarLlama(Llama):
    """A Llama whose head for the next token gave way to one for a number.

    Functional as `Llama`, with the parameters of `scalar` instead of those of
    `unembed` (paper, section 3.2.2: the architecture and hyper-parameters are else
    those of the chat model). There is no bias.
    """

    head: ClassVar[Head] = "scalar"

    def setup(self) -> None:
        """Declare the parameters."""
        super().setup()
        self.scalar = Scalar()

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        segments_BT: Int[Array, "B T"] | None = None,
        positions_BT: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T"]:
        """The number at each position; arguments are those of `Llama`."""
        hidden_BTD = self.hidden(tokens_BT, segments_BT, positions_BT)
        with jax.named_scope("scalar"):
            return self.constrain(self.scalar(hidden_BTD), axes.BATCH, axes.SEQUENCE)


MODELS: Mapping[Head, type[Llama]] = {"unembed": Llama, "scalar": ScalarLlama}
