"""A closed-form estimate of a training step: memory and time by arithmetic alone.

It needs no compiler and takes no time, so it narrows a search before anything is
compiled, and stands in where libtpu is missing. What it says of parameters and
optimizer is exact; of the rest, as good as the rates below, which were set by
comparison with compiled steps of 7B and 70B. Letters as in the model: D width, F inner
width, N heads, K key/value heads, H head width, L layers, V vocabulary, T positions.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from llama_jax.build import params_layout
from llama_jax.config import LlamaConfig
from llama_jax.config.model import Head
from llama_jax.config.recipe import PpoRecipe, TrainingRecipe
from llama_jax.config.train import Remat, remat_pieces
from llama_jax.model import num_params
from llama_jax.model.count import abstract_params
from llama_jax.planning.schedule import (
    KERNEL_EFFICIENCY,
    USUAL_KERNEL_EFFICIENCY,
    Collective,
    Resource,
)
from llama_jax.planning.topology import Topology
from sharding import MeshConfig, abstract_mesh, training_rules

NAME = "closed-form estimate"

# Shares of the peak that compiled programs come to, by the compiler's own cycles.
MATMUL_EFFICIENCY = 0.82
# Of the time that collectives take, the share that no arithmetic hides; on v4 the
# compiler makes those of fsdp synchronous.
EXPOSED = {"v4": 1.0, "v5e": 0.3, "v5p": 0.4, "v6e": 0.3}
# Attention across `context` without the kernel is compiled in tiles: share of peak.
_TILED_EFFICIENCY = 0.07
# All that is neither product nor kernel, forward and backward, as passes over one
# layer's residual stream through HBM.
_PASSES = 250
# Tiles that the diagonal cuts are computed whole.
_TILE = 512
# Above this many devices the compiler sums gradients whole on each (all-reduce), and
# then keeps a part; up to it, it scatters them.
_LARGEST_SCATTER = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """What arithmetic says of one step, per chip.

    Attributes:
      memory: bytes at the fullest moment, by kind.
      seconds: of a step, by what they are spent on; they follow one another.
      collectives: of a step, the longest first.
    """

    memory: Mapping[str, int]
    seconds: Mapping[str, float]
    collectives: tuple[Collective, ...]

    @property
    def hbm_bytes(self) -> int:
        """All memory."""
        return sum(self.memory.values())

    @property
    def step_seconds(self) -> float:
        """All time."""
        return sum(self.seconds.values())


def estimate(recipe: TrainingRecipe, topology: Topology) -> Estimate:
    """Memory and time of one step of a recipe.

    Raises:
      ShardingError: mesh, model and topology do not divide.
    """
    sizes = _Sizes.of(recipe, topology)
    collectives = _collectives(sizes)
    exposed = sum(each.exposed_seconds for each in collectives)
    return Estimate(
        memory=_memory(sizes),
        seconds=_compute(sizes) | {"exposed communication": exposed},
        collectives=collectives,
    )


@functools.cache
def state_bytes(
    config: LlamaConfig,
    mesh: MeshConfig,
    num_chips: int,
    moments: str,
    head: Head = "unembed",
) -> tuple[int, int]:
    """Bytes of parameters, and of Adam's two moments, that a chip holds; exact.

    Raises:
      ShardingError: the mesh does not divide the model, or the chips.
    """
    shapes = abstract_params(config, head)
    rules = training_rules(sequence_parallel=False)
    layout = params_layout(config, abstract_mesh(mesh, num_chips), rules, head)
    numbers = sum(
        math.prod(sharding.shard_shape(leaf.shape))
        for leaf, sharding in zip(
            jax.tree.leaves(shapes), jax.tree.leaves(layout), strict=True
        )
    )
    return 4 * numbers, 2 * jnp.dtype(moments).itemsize * numbers


def beside_bytes(recipe: TrainingRecipe, num_chips: int) -> dict[str, int]:
    """Bytes of the models that a chip holds beside the one that is trained; exact.

    Those of PPO: a critic and its moments, and in the type of the arithmetic a
    reference and two reward models, all of the policy's sizes.
    """
    if not isinstance(recipe, PpoRecipe):
        return {}

    def held(head: Head) -> tuple[int, int]:
        moments = recipe.optimizer.moments
        return state_bytes(recipe.model, recipe.mesh, num_chips, moments, head)

    frozen = held("unembed")[0] + 2 * held("scalar")[0]
    width = jnp.dtype(recipe.train.compute_dtype).itemsize
    return {
        "critic and its optimizer": sum(held("scalar")),
        "reference and reward models": frozen * width // 4,
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sizes:
    """A recipe and a topology, in the numbers that the formulas need."""

    recipe: TrainingRecipe
    topology: Topology
    mesh: Mapping[str, int]
    rows: float  # of a sequence, that a chip works on at once
    width: int  # bytes of a number in the arithmetic

    @classmethod
    def of(cls, recipe: TrainingRecipe, topology: Topology) -> "_Sizes":
        mesh = abstract_mesh(recipe.mesh, topology.num_chips).shape
        parts = mesh["data"] * mesh["fsdp"] * recipe.train.accumulate
        return cls(
            recipe=recipe,
            topology=topology,
            mesh=mesh,
            rows=recipe.train.batch_size / parts,
            width=jnp.dtype(recipe.train.compute_dtype).itemsize,
        )

    @property
    def shards(self) -> int:
        """Parts of the state that work on different rows."""
        return self.mesh["fsdp"]

    @property
    def context(self) -> int:
        """Pieces of a sequence."""
        return self.mesh["context"]

    @property
    def tensor(self) -> int:
        """Pieces of a layer."""
        return self.mesh["tensor"]

    @property
    def tokens(self) -> float:
        """Positions that a chip works on at once."""
        return self.rows * self.recipe.data.sequence_length / self.context

    @property
    def residual_tokens(self) -> float:
        """Those of them whose residual stream it holds between layers."""
        return self.tokens / (self.tensor if self.recipe.sequence_parallel else 1)

    @property
    def block_params(self) -> int:
        """Matrix parameters of one block, of all chips."""
        c = self.recipe.model
        attention = 2 * c.dim * (c.num_heads + c.num_kv_heads) * c.head_dim
        return attention + 3 * c.dim * c.hidden_dim

    @property
    def depths(self) -> list[tuple[Remat, int]]:
        """The remat policies, and how many layers each holds for."""
        left, depths = self.recipe.model.num_layers, list[tuple[Remat, int]]()
        for policy, count in remat_pieces(self.recipe.train.remat):
            depths.append((policy, left if count is None else count))
            left -= depths[-1][1]
        return depths

    @property
    def params_per_chip(self) -> float:
        """Parameters whose state lies on one chip."""
        recipe = self.recipe
        return num_params(recipe.model, recipe.head) / (self.shards * self.tensor)

    @property
    def head_width(self) -> int:
        """Numbers that the head gives at each position."""
        return self.recipe.model.vocab_size if self.recipe.head == "unembed" else 1

    @property
    def ends_params(self) -> int:
        """Parameters of the embedding and of the head."""
        c = self.recipe.model
        return (c.vocab_size + self.head_width) * c.dim


def _saved(sizes: _Sizes, policy: Remat) -> float:
    """Bytes of one layer that a remat policy leaves for the backward pass."""
    c, b = sizes.recipe.model, sizes.width
    heads = c.num_heads * c.head_dim / sizes.tensor
    keys = 2 * max(c.num_kv_heads / sizes.tensor, 1) * c.head_dim
    inner = c.hidden_dim / sizes.tensor
    stream = sizes.residual_tokens * c.dim * b
    log_sums = 4 * sizes.tokens * c.num_heads / sizes.tensor
    attention = sizes.tokens * heads * b + log_sums
    projections = sizes.tokens * (heads + keys) * b + sizes.tokens * c.dim * b
    gates = sizes.tokens * 2 * inner * b
    match policy:
        case "full" | "offload":
            return stream
        case "attention":
            return stream + attention
        case "attention_block":
            return stream + attention + projections
        case "projections":
            return stream + attention + projections + gates
        case "none":  # also both norms, the rotated heads and silu(gate) x up
            norms = sizes.tokens * 2 * c.dim * (b + 4)
            rotated = sizes.tokens * (heads + keys) * b
            product = sizes.tokens * inner * b
            everything = attention + projections + gates + norms + rotated + product
            return stream + everything + _scores(sizes)


def _scores(sizes: _Sizes) -> float:
    """Bytes of one layer's attention scores, if they are ever written out."""
    if sizes.recipe.train.attention != "dot" or sizes.context > 1:
        return 0
    heads = sizes.recipe.model.num_heads / sizes.tensor
    return sizes.tokens * sizes.recipe.data.sequence_length * heads * 4


def _memory(sizes: _Sizes) -> dict[str, int]:
    recipe, c, b = sizes.recipe, sizes.recipe.model, sizes.width
    parameters, optimizer = state_bytes(
        c,
        recipe.mesh,
        sizes.topology.num_chips,
        recipe.optimizer.moments,
        recipe.head,
    )
    gradients = parameters * (1 if recipe.train.accumulate == 1 else 2)
    activations = sum(num * _saved(sizes, policy) for policy, num in sizes.depths)
    # One layer at work in the backward pass: what it recomputed, with gradients; two
    # layers' weights gathered, for the next is fetched meanwhile, and a gradient.
    layer = 2 * _saved(sizes, "projections") + 2 * _scores(sizes)
    weights = sizes.block_params / sizes.tensor * b * (3 if sizes.shards > 1 else 1)
    # Both ends: logits and their gradient, the embedding and the head gathered.
    logits = 2 * 4 * sizes.tokens * sizes.head_width / sizes.tensor
    logits /= recipe.train.loss_chunks
    ends = sizes.ends_params / sizes.tensor * b if sizes.shards > 1 else 0
    backward = {"gradients": gradients, "one layer at work": layer + weights}
    loss = {"logits": logits, "embedding and head": ends}
    if recipe.train.accumulate > 1:
        loss["gradients"] = gradients / 2
    fullest = max(backward, loss, key=lambda moment: sum(moment.values()))
    kinds = {
        "parameters": parameters,
        "optimizer": optimizer,
        "activations": activations,
        **fullest,
        **beside_bytes(recipe, sizes.topology.num_chips),
    }
    return {kind: round(size) for kind, size in kinds.items()}


def _compute(sizes: _Sizes) -> dict[str, float]:
    """Seconds of arithmetic, and of what moves memory only."""
    recipe, c, chip = sizes.recipe, sizes.recipe.model, sizes.topology.chip
    tokens = sizes.tokens * recipe.train.accumulate
    attention_params = sizes.block_params - 3 * c.dim * c.hidden_dim
    # Products that a policy runs again; the last one, down, is not needed twice.
    again = {
        "full": attention_params + 2 * c.dim * c.hidden_dim,
        "attention": attention_params + 2 * c.dim * c.hidden_dim,
        "attention_block": 2 * c.dim * c.hidden_dim,
        "offload": 2 * c.dim * c.hidden_dim,
        "projections": 0,
        "none": 0,
    }
    products = 3.0 * (sizes.head_width * c.dim + c.num_layers * sizes.block_params)
    products += sum(num * again[policy] for policy, num in sizes.depths)
    # Forward 1, backward 2.5: it has five products where the forward has two.
    kernels = sum(
        num * (4.5 if policy == "full" else 3.5) for policy, num in sizes.depths
    )
    matmul = 2 * products * tokens / sizes.tensor
    width = c.num_heads * c.head_dim / sizes.tensor
    length = recipe.data.sequence_length
    kernel = 2 * kernels * tokens * (length + min(_TILE, length)) * width
    peak = chip.peak_flops
    crosses = sizes.context > 1
    ring = crosses and recipe.train.context_attention == "ring"
    if recipe.train.attention == "splash" and not ring:
        share = KERNEL_EFFICIENCY.get(chip.name, USUAL_KERNEL_EFFICIENCY)
        attention = kernel / (peak * share)
    elif crosses:
        attention = kernel / (peak * _TILED_EFFICIENCY)
    else:  # the whole square, and scores that pass through memory some ten times
        moved = 10 * c.num_layers * _scores(sizes) * recipe.train.accumulate
        attention = 2 * kernel / (peak * MATMUL_EFFICIENCY)
        attention += moved / chip.hbm_bandwidth
    # Norms, rotations, gates and copies are as slow as this many passes over the
    # residual stream would be.
    passes = _PASSES * c.num_layers * tokens * c.dim * sizes.width
    # Adam reads and writes a parameter and two moments, and reads a gradient.
    moment = jnp.dtype(recipe.optimizer.moments).itemsize
    update = sizes.params_per_chip * (3 * 4 + 4 * moment)
    return {
        "matmul": matmul / (peak * MATMUL_EFFICIENCY),
        "attention": attention,
        "other compute": (passes + update) / chip.hbm_bandwidth,
    }


def _collectives(sizes: _Sizes) -> tuple[Collective, ...]:
    """What a step sends, as each chip gathers or sums it."""
    recipe, c, b = sizes.recipe, sizes.recipe.model, sizes.width
    times, layers = recipe.train.accumulate, c.num_layers
    params = (layers * sizes.block_params + sizes.ends_params) / sizes.tensor
    stream = sizes.tokens * c.dim * b
    keys = 2 * max(c.num_kv_heads / sizes.tensor, 1) * c.head_dim * b
    # Weights are gathered forward and backward. Of the two sums of Megatron's layers
    # each pass has two. A ring passes keys and values on, and their gradients back.
    scatter = "reduce-scatter" if sizes.shards <= _LARGEST_SCATTER else "all-reduce"
    sent = (
        ("fsdp", "all-gather", 2 * layers * times, 2 * params * b * times),
        ("fsdp", scatter, layers * times, params * b * times),
        ("data", "all-reduce", layers * times, 4 * params / sizes.shards * times),
        ("tensor", "all-reduce", 4 * layers * times, 4 * layers * stream * times),
        (
            "context",
            "collective-permute",
            3 * layers * (sizes.context - 1) * times,
            3 * layers * (sizes.context - 1) * sizes.tokens * keys * times,
        ),
    )
    mesh = recipe.mesh
    across = {"data": mesh.dcn_data, "fsdp": mesh.dcn_fsdp}
    found = list[Collective]()
    for axis, kind, count, num_bytes in sent:
        slices = across.get(axis, 1)
        group = sizes.mesh[axis] // slices
        # A slice sums or gathers within itself; then each chip exchanges its own part
        # with its likes in the other slices.
        for network, members, moved in (
            ("ici", group, num_bytes),
            ("dcn", slices, num_bytes / group),
        ):
            if members > 1:
                seconds = (
                    moved
                    * _share_sent(kind, members)
                    / _bandwidth(sizes.topology, network, members)
                )
                found.append(
                    Collective(
                        kind=kind,
                        axes=(axis,),
                        network=network,
                        count=count,
                        num_bytes=moved,
                        seconds=seconds,
                        exposed_seconds=seconds * EXPOSED[sizes.topology.chip.name],
                    )
                )
    return tuple(sorted(found, key=lambda each: -each.seconds))


def _share_sent(kind: str, members: int) -> float:
    """How often a ring of members moves an array past each of them."""
    if kind == "collective-permute":
        return 1
    return (2 if kind == "all-reduce" else 1) * (members - 1) / members


def _bandwidth(topology: Topology, network: Resource, members: int) -> float:
    """Bytes a second of a ring, both ways around, over the dimensions it spans."""
    if network == "dcn":
        return topology.chip.dcn_bandwidth
    return 2 * topology.chip.ici_bandwidth * _dims_spanned(topology, members)


def _dims_spanned(topology: Topology, group: int) -> int:
    """Dimensions of the torus along which a group of neighbours can send at once."""
    reached, dims = 1, 0
    for size in reversed(topology.sizes):
        if reached < group:
            reached, dims = reached * size, dims + 1
    return max(dims, 1)
