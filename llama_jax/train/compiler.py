"""What the TPU compiler is told beyond the program, for each kind of chip.

An option is here because a compile of a recipe's step for a real topology was better
with it; docs/adr/0008 has the figures. Another chip, or a CPU, is told nothing.
"""

import jax

# SparseCores carry what is gathered and summed while TensorCores multiply.
_SPARSE_CORES = {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": "true",
}
_V5P = {
    **_SPARSE_CORES,
    "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": "true",
    "xla_tpu_use_tc_device_shape_on_sc": "true",
    "xla_sc_disable_megacore_partitioning": "true",
    "xla_sc_enable_instruction_fusion": "false",
    # By default products are cut into the steps of a ring where groups are small.
    "xla_tpu_enable_windowed_einsum_for_all_gather": "false",
    "xla_tpu_enable_windowed_einsum_for_reduce_scatter": "false",
}
# All-reduces run beside compute.
_V5E = {
    "xla_enable_async_all_reduce": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true",
}

# Room for larger tiles in fast memory.
_V6E = {**_SPARSE_CORES, "xla_tpu_scoped_vmem_limit_kib": "98304"}

# By `jax.Device.device_kind`; a v5p says "TPU v5" or "TPU v5p".
_OPTIONS = {
    "TPU v5 lite": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
}


def compiler_options(mesh: jax.sharding.Mesh) -> dict[str, str]:
    """Options for programs on this mesh, for `jax.jit`."""
    return _OPTIONS.get(mesh.devices.flat[0].device_kind, {})
