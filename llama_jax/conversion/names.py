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
    hf: Stored


@dataclasses.dataclass(frozen=True)
class Weight:
    """What other formats hold as one tensor: a leaf, or one layer of a stacked leaf.

    Attributes:
      parameter: the leaf.
      layer: which block it belongs to, if to any.
    """

    parameter: Parameter
    layer: int | None = None

    @property
    def name(self) -> str:
        """The name that reports and manifests use: Hugging Face's."""
        return self.stored_name(self.parameter.hf)

    @property
    def axes(self) -> str:
        """The letters of this weight's axes here, without the layers'."""
        return self.parameter.axes.removeprefix("L")

    def stored_name(self, form: Stored) -> str:
        """The name in one of the parameter's forms."""
        return form.name.format(layer=self.layer)

    def index(self, part: tuple[slice, ...] = ()) -> tuple[slice, ...]:
        """Where (a part of) this weight is in its leaf."""
        if self.layer is None:
            return part
        return (slice(self.layer, self.layer + 1), *part)


# Meta splits as Megatron does. Column-parallel layers (the projections into heads and
# into the feed-forward width, and the unembedding) hold a share of the outputs;
# row-parallel ones (`wo`, `w2`) hold the matching share of the inputs, so that a pair
# of them needs one sum over shards. The embedding is split along its width.
# Hugging Face splits nothing, and pairs rotary features as this project does.
PARAMETERS = (
    Parameter(
        "embed/table",
        "VD",
        Stored("tok_embeddings.weight", "V D", "D"),
        Stored("model.embed_tokens.weight", "V D"),
    ),
    Parameter(
        "blocks/attention_norm/scale",
        "LD",
        Stored("layers.{layer}.attention_norm.weight", "D"),
        Stored("model.layers.{layer}.input_layernorm.weight", "D"),
    ),
    Parameter(
        "blocks/attention/query",
        "LDNH",
        Stored("layers.{layer}.attention.wq.weight", "NH D", "N", interleaved=True),
        Stored("model.layers.{layer}.self_attn.q_proj.weight", "NH D"),
    ),
    Parameter(
        "blocks/attention/key",
        "LDKH",
        Stored("layers.{layer}.attention.wk.weight", "KH D", "K", interleaved=True),
        Stored("model.layers.{layer}.self_attn.k_proj.weight", "KH D"),
    ),
    Parameter(
        "blocks/attention/value",
        "LDKH",
        Stored("layers.{layer}.attention.wv.weight", "KH D", "K"),
        Stored("model.layers.{layer}.self_attn.v_proj.weight", "KH D"),
    ),
    Parameter(
        "blocks/attention/out",
        "LNHD",
        Stored("layers.{layer}.attention.wo.weight", "D NH", "N"),
        Stored("model.layers.{layer}.self_attn.o_proj.weight", "D NH"),
    ),
    Parameter(
        "blocks/mlp_norm/scale",
        "LD",
        Stored("layers.{layer}.ffn_norm.weight", "D"),
        Stored("model.layers.{layer}.post_attention_layernorm.weight", "D"),
    ),
    Parameter(
        "blocks/mlp/gate",
        "LDF",
        Stored("layers.{layer}.feed_forward.w1.weight", "F D", "F"),
        Stored("model.layers.{layer}.mlp.gate_proj.weight", "F D"),
    ),
    Parameter(
        "blocks/mlp/up",
        "LDF",
        Stored("layers.{layer}.feed_forward.w3.weight", "F D", "F"),
        Stored("model.layers.{layer}.mlp.up_proj.weight", "F D"),
    ),
    Parameter(
        "blocks/mlp/down",
        "LFD",
        Stored("layers.{layer}.feed_forward.w2.weight", "D F", "F"),
        Stored("model.layers.{layer}.mlp.down_proj.weight", "D F"),
    ),
    Parameter(
        "final_norm/scale",
        "D",
        Stored("norm.weight", "D"),
        Stored("model.norm.weight", "D"),
    ),
    Parameter(
        "unembed/kernel",
        "DV",
        Stored("output.weight", "V D", "V"),
        Stored("lm_head.weight", "V D"),
    ),
)


def weights(config: LlamaConfig) -> list[Weight]:
    """Every weight of a model, in the order in which checkpoints are written.

    The embedding, the blocks one after the other, the last norm, the unembedding.
    """
    stacked = [p for p in PARAMETERS if p.axes.startswith("L")]
    first = PARAMETERS.index(stacked[0])
    single = [Weight(p) for p in PARAMETERS if p not in stacked]
    layers = range(config.num_layers)
    blocks = [Weight(p, layer) for layer in layers for p in stacked]
    return single[:first] + blocks + single[first:]


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
