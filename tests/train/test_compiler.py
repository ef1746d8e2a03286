"""Compiler options belong to a kind of chip."""

import types

import numpy as np
import pytest

from llama_jax.train.compiler import compiler_options
from sharding import MeshConfig, make_mesh


def mesh_of(kind):
    device = types.SimpleNamespace(device_kind=kind)
    return types.SimpleNamespace(devices=np.array([[device]], dtype=object))


def test_a_cpu_is_told_nothing():
    assert compiler_options(make_mesh(MeshConfig())) == {}


@pytest.mark.parametrize(
    "kind, option",
    [
        ("TPU v5", "xla_tpu_enable_sparse_core_collective_offload_all_reduce"),
        ("TPU v5p", "xla_tpu_enable_sparse_core_collective_offload_all_reduce"),
        ("TPU v5 lite", "xla_enable_async_all_reduce"),
        ("TPU v6 lite", "xla_tpu_scoped_vmem_limit_kib"),
    ],
)
def test_each_generation_has_its_own(kind, option):
    assert option in compiler_options(mesh_of(kind))
    assert compiler_options(mesh_of("TPU v4")) == {}
