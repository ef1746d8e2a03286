"""The vocabulary: the axes of a mesh, and the logical axes of arrays.

Models name what a dimension *is* (a logical axis); meshes name what devices *do* (a
mesh axis). `rules.py` maps the one to the other.
"""

from collections.abc import Mapping
from typing import Any

# Mesh axes, slowest network first: replicas may sit in different slices, joined by the
# data-centre network; tensor parallelism talks most and gets the nearest neighbours.
DATA = "data"  # replicas of the whole state
FSDP = "fsdp"  # shards of parameters and optimizer; each works on other rows
CONTEXT = "context"  # pieces of one sequence, which attention crosses
TENSOR = "tensor"  # heads and feed-forward columns, after Megatron

MESH_AXES = (DATA, FSDP, CONTEXT, TENSOR)

# Logical axes of activations.
BATCH = "batch"  # rows
SEQUENCE = "sequence"  # positions, inside attention and the feed-forward layer
RESIDUAL = "residual"  # positions of the residual stream, between those

# Logical axes of parameters and of what they produce.
LAYERS = "layers"  # the stack of blocks
EMBED = "embed"  # rows or columns of a weight that meet the residual stream
HEADS = "heads"  # query heads
KV_HEADS = "kv_heads"  # key and value heads
MLP = "mlp"  # inner features of the feed-forward layer
VOCAB = "vocab"  # pieces of the tokenizer

LOGICAL_AXES = (BATCH, SEQUENCE, RESIDUAL, LAYERS, EMBED, HEADS, KV_HEADS, MLP, VOCAB)

# One name per dimension of an array; None for a dimension that is never split.
AxisNames = tuple[str | None, ...]

# A tree of parameters, or of anything shaped like one.
Tree = Mapping[str, Any]
