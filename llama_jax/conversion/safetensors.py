"""Tensors from Hugging Face's `.safetensors` files, and the header of such a file.

The format: the length of a header, 8 bytes little-endian; the header, a JSON object
that gives each tensor's type, shape and range of bytes; and the bytes, without holes.
"""

import json
import math
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeGuard

import ml_dtypes
import numpy as np
from etils import epath

from llama_jax.conversion.files import Bytes, Tensor, open_bytes, tensor_at
from llama_jax.errors import CheckpointError

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_METADATA = "__metadata__"
_LENGTH = struct.Struct("<Q")
_ALIGNMENT = 8
# The format allows 100 MB. Three bytes of JSON can take seventy of memory, and the
# header of the largest Llama is under 0.2 MB.
_MAX_HEADER = 2**24
_MAX_DIMS = 64  # NumPy's


class _Place(NamedTuple):
    """A tensor of a file; its bytes are counted from the end of the header."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    stop: int


def read_safetensors(path: epath.PathLike) -> dict[str, Tensor]:
    """Every tensor of a file by name, as read-only views of the mapped file.

    The bytes of a tensor are read when it is used, and only those. Those of a file in
    a bucket are read when the tensor is indexed.

    Raises:
      CheckpointError: the file is missing, empty, damaged or not of this format.
    """
    try:
        content = _open(path)
        described, first = _read_header(path, content)
        places = {name: _place(name, entry) for name, entry in described.items()}
        _require_no_holes(places, content.size - first)
        return {
            name: tensor_at(content, first + place.start, place.shape, place.dtype)
            for name, place in places.items()
        }
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror or error}): copy it from where "
            "the weights came from."
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is truncated or damaged ({str(error)[:200]}): copy it again."
        ) from error


def header_of(
    shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype[Any]
) -> tuple[bytes, dict[str, int]]:
    """All of a file before its tensors, which are of one type and in this order.

    Returns:
      The header, its length included, and where in the file each tensor starts.
    """
    # transformers refuses a file that does not say whose tensors it holds.
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    stop = 0
    for name, shape in shapes.items():
        start, stop = stop, stop + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [start, stop],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    first = _LENGTH.size + len(text)
    offsets = {name: first + header[name]["data_offsets"][0] for name in shapes}
    return _LENGTH.pack(len(text)) + text, offsets


def _open(path: epath.PathLike) -> Bytes:
    with epath.Path(path).open("rb") as file:
        start = file.read(40)
    if not start:
        raise CheckpointError(f"{path} is empty: copy it again.")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path} is a pointer of Git LFS, not the weights: run `git lfs pull`, or "
            "download the file itself."
        )
    # The length of a header that begins as all do, at the ninth byte.
    if start[8:9] not in (b"{", b""):
        raise CheckpointError(
            f"{path} is no safetensors file, it starts with {start[:16]!r}: copy the "
            "weights themselves, not a web page or another format in their place."
        )
    return open_bytes(path)


def _read_header(path: epath.PathLike, content: Bytes) -> tuple[dict[str, Any], int]:
    """What the header says of each tensor, and where it ends."""
    if content.size < _LENGTH.size:
        raise ValueError(f"{content.size} bytes are no header")
    (length,) = _LENGTH.unpack(content[: _LENGTH.size].tobytes())
    stop = _LENGTH.size + length
    if stop > content.size:
        raise ValueError(f"a header of {length} bytes in a file of {content.size}")
    if length > _MAX_HEADER:
        raise CheckpointError(
            f"{path} has a header of {length} bytes, and up to {_MAX_HEADER} are read: "
            "no Llama needs as many. Get the weights from their publisher."
        )
    text = content[_LENGTH.size : stop].tobytes().decode()
    header = json.loads(text, object_pairs_hook=_unique)
    if not isinstance(header, dict):
        raise ValueError("the header is no object")
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise ValueError(f"{_METADATA} is no map of texts")
    return header, stop


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is in the header twice")
    return found


def _place(name: str, entry: Any) -> _Place:
    """What the header says of one tensor, checked by itself."""
    # Printable, so that every message may show it.
    if not name.isprintable():
        raise ValueError(f"{name[:80]!a} is no name")
    name = name[:80]
    if not isinstance(entry, dict):
        raise ValueError(f"{name} is described by no object")
    dtype, shape = entry.get("dtype"), entry.get("shape")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"{name} is of none of the types {', '.join(_DTYPES)}")
    if not _are_sizes(shape) or len(shape) > _MAX_DIMS:
        raise ValueError(f"the shape of {name} is no list of sizes")
    offsets = entry.get("data_offsets")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"the data_offsets of {name} are not two")
    start, stop = offsets
    num_bytes = math.prod(shape) * _DTYPES[dtype].itemsize
    if start + num_bytes != stop:
        raise ValueError(f"{name} does not fill its bytes, {start} to {stop}")
    return _Place(_DTYPES[dtype], tuple(shape), start, stop)


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    # Bounded, so that 64 of them are multiplied in no time.
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < 2**63 for value in values
    )


def _require_no_holes(places: Mapping[str, _Place], num_bytes: int) -> None:
    """See to it that the tensors are all of the data, one behind the other."""
    end = 0
    for place in sorted(places.values(), key=lambda place: (place.start, place.stop)):
        if place.start != end:
            raise ValueError(
                f"a tensor starts at {place.start}, the last ended at {end}"
            )
        end = place.stop
    if end != num_bytes:
        raise ValueError(f"{num_bytes} bytes of tensors, and they take {end}")
