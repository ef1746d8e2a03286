"""Meshes and sharding rules for TPU pods; knows nothing of any model."""

from sharding.apply import (
    Constrain,
    array_sharding,
    born_sharded,
    constrain,
    param_shardings,
    per_device,
)
from sharding.errors import ShardingError
from sharding.mesh import MeshConfig, abstract_mesh, make_mesh
from sharding.rules import AxisRules, decoding_rules, training_rules

__all__ = [
    "AxisRules",
    "Constrain",
    "MeshConfig",
    "ShardingError",
    "abstract_mesh",
    "array_sharding",
    "born_sharded",
    "constrain",
    "decoding_rules",
    "make_mesh",
    "param_shardings",
    "per_device",
    "training_rules",
]
