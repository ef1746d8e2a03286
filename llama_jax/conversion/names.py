"""One table of the parameters: their names and axes, here and in other formats.

One letter per axis: L layers, V vocabulary, D model width, N query heads, K key/value
heads, H head width, F feed-forward width.
"""

import dataclasses
import math
from collections.abc import Mapping

from llama_jax.config import LlamaConfig


@dataclasses.dataclass(frozen=True)
class Stored:
    """How a checkpoint format holds a parameter.

    Attributes:
      name: of the tensor; `{layer}` stands for the number of the block.
      dims: the letters of each dimension, slowest first. "NH D" is a matrix whose
        rows run over heads and, within each, features. Formats store matrices as
        [out, in]; this project multiplies from the left, y = x @ kernel, so most are
        transposed on the way.
      split: the axis divided over model-parallel shards; None is a copy in each.
      interleaved: whether rotary pairs are neighbours along H (see rope.py).
    """

    name: str
    dims: str
    split: str | None = None
    interleaved: bool = False

    @property
    def axes(self) -> str:
        """The letters of the tensor once its dimensions are unfolded."""
        return self.dims.replace(" ", "")

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape as stored, given the size of each axis."""
        return tuple(
            math.prod(sizes[axis] for axis in dim) for dim in self.dims.split()
        )


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One leaf of the parameter tree: its path, its axes, its other forms."""

    path: str
    axes: str
    meta: Stored


# Meta splits as Megatron does. Column-parallel layers (the projections into heads and
# into the feed-forward width, and the unembedding) hold a share of the outputs;
# row-parallel ones (`wo`, `w2`) hold the matching share of the inputs, so that a pair
# of them needs one sum over shards. The embedding is split along its width.
PARAMETERS = (
    Parameter("embed/table", "VD", Stored("tok_embeddings.weight", "V D", "D")),
    Parameter(
        "blocks/attention_norm/scale",
        "LD",
        Stored("layers.{layer}.attention_norm.weight", "D"),
    ),
    Parameter(
        "blocks/attention/query",
        "LDNH",
        Stored("layers.{layer}.attention.wq.weight", "NH D", "N", interleaved=True),
    ),
    Parameter(
        "blocks/attention/key",
        "LDKH",
        Stored("layers.{layer}.attention.wk.weight", "KH D", "K", interleaved=True),
    ),
    Parameter(
        "blocks/attention/value",
        "LDKH",
        Stored("layers.{layer}.attention.wv.weight", "KH D", "K"),
    ),
    Parameter(
        "blocks/attention/out",
        "LNHD",
        Stored("layers.{layer}.attention.wo.weight", "D NH", "N"),
    ),
    Parameter(
        "blocks/mlp_norm/scale", "LD", Stored("layers.{layer}.ffn_norm.weight", "D")
    ),
    Parameter(
        "blocks/mlp/gate",
        "LDF",
        Stored("layers.{layer}.feed_forward.w1.weight", "F D", "F"),
    ),
    Parameter(
        "blocks/mlp/up",
        "LDF",
        Stored("layers.{layer}.feed_forward.w3.weight", "F D", "F"),
    ),
    Parameter(
        "blocks/mlp/down",
        "LFD",
        Stored("layers.{layer}.feed_forward.w2.weight", "D F", "F"),
    ),
    Parameter("final_norm/scale", "D", Stored("norm.weight", "D")),
    Parameter("unembed/kernel", "DV", Stored("output.weight", "V D", "V")),
)


def axis_sizes(config: LlamaConfig) -> dict[str, int]:
    """The size of each axis of the table in a model of this architecture."""
    return {
        "L": config.num_layers,
        "V": config.vocab_size,
        "D": config.dim,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
        "F": config.hidden_dim,
    }
