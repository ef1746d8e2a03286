"""Values of weights: whether they are numbers, and rounding them to another type."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from llama_jax.errors import CheckpointError

# The bits of the exponent, all set in NaN and infinity, and the integers to see them.
_EXPONENT = {
    "float32": (np.uint32, 0x7F800000),
    "float16": (np.uint16, 0x7C00),
    "bfloat16": (np.uint16, 0x7F80),
}
# Values looked at together: few enough to stay in the processor's cache.
_BLOCK = 2**16


def all_finite(array: np.ndarray[Any, Any]) -> bool:
    """Whether no value is NaN or infinite; much faster than by `np.isfinite`."""
    kind, exponent = _EXPONENT[array.dtype.name]
    bits = array.view(kind)
    if array.flags.c_contiguous:
        bits = bits.reshape(-1)
        blocks = (bits[i : i + _BLOCK] for i in range(0, bits.size, _BLOCK))
    else:
        blocks = iter(bits)
    return not any(
        (np.bitwise_and(block, kind(exponent)) == exponent).any() for block in blocks
    )


def round_to(dtype: jnp.dtype, array: np.ndarray, *, what: str) -> np.ndarray:
    """The values in another type, to nearest.

    Raises:
      CheckpointError: a number has become infinite.
    """
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore", invalid="ignore"):  # looked for below
        rounded = array.astype(dtype)
    if all_finite(rounded):
        return rounded
    was_finite = np.isfinite(array.astype(np.float32))
    beyond = was_finite & ~np.isfinite(rounded.astype(np.float32))
    if beyond.any():
        largest = np.abs(array[beyond].astype(np.float32)).max()
        raise CheckpointError(
            f"{what} has {beyond.sum()} values, up to {largest:.4g}, that {dtype} "
            f"cannot hold (at most {float(jnp.finfo(dtype).max):.4g}): give another "
            "dtype, such as bfloat16."
        )
    return rounded
