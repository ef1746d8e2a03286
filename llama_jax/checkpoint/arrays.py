"""The arrays of an Orbax checkpoint one by one, and in parts.

Orbax reads and writes whole arrays, through TensorStore. A stacked matrix of a 70B is
38 GB, so converting opens the same arrays here and goes through them chunk by chunk.
Arrays are zarr in one OCDBT store; `_METADATA` says which tree they make up.
"""

import errno
import json
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath

# What an array is called in the store: the keys of its path, joined by dots.
Shapes = Mapping[str, tuple[int, ...]]

_TREE = "_METADATA"
_CHECKPOINT = "_CHECKPOINT_METADATA"
# Orbax's sign, in buckets, that nothing is missing.
_COMMITTED = "commit_success.txt"
_OCDBT = "manifest.ocdbt"
_HANDLER = (
    "orbax.checkpoint._src.handlers.standard_checkpoint_handler."
    "StandardCheckpointHandler"
)
_DICT_KEY = 2
# Data files are written when they reach this size, and so stay out of memory.
_DATA_FILE_BYTES = 2**27


class Arrays:
    """The arrays of one checkpoint's directory.

    Args:
      directory: Orbax's, or one that is to become so; absolute.
    """

    def __init__(self, directory: epath.Path) -> None:
        self._directory = directory
        self._opened: dict[str, ts.TensorStore] = {}
        # The system's cache is enough; and one sync at the end, not one a file.
        self._context = ts.Context(
            {
                "cache_pool": {"total_bytes_limit": 0},
                "file_io_sync": False,
                "file_io_concurrency": {"limit": 4},
                "data_copy_concurrency": {"limit": 2},
            }
        )

    def open(self, name: str) -> ts.TensorStore:
        """An array that is there; index it, then `.read()` or `.write(...)`.

        Raises:
          ValueError: it is damaged or missing.
        """
        if name not in self._opened:
            tree = json.loads((self._directory / _TREE).read_text())
            spec = {
                "driver": "zarr3" if tree.get("use_zarr3") else "zarr",
                "kvstore": self._store(name, ocdbt=(self._directory / _OCDBT).exists()),
            }
            array = ts.open(spec, open=True, context=self._context).result()
            self._opened[name] = array
        return self._opened[name]

    def create(
        self,
        name: str,
        shape: tuple[int, ...],
        chunk: tuple[int, ...],
        dtype: np.dtype[Any],
    ) -> None:
        """A new array, or the one that was begun.

        Weights are as good as random, so they are not compressed.

        Raises:
          OSError: it cannot be written.
        """
        spec = {
            "driver": "zarr",
            "kvstore": self._store(name, ocdbt=True),
            "metadata": {
                "shape": shape,
                "chunks": chunk,
                "dtype": dtype.name if dtype.name == "bfloat16" else dtype.str,
                "compressor": None,
                "order": "C",
                "dimension_separator": ".",
            },
            # A chunk of zeros is written too, so that none is missing.
            "store_data_equal_to_fill_value": True,
        }
        opened = ts.open(spec, open=True, create=True, context=self._context)
        self._opened[name] = _result(opened)

    def write(self, name: str, index: tuple[slice, ...], values: np.ndarray) -> None:
        """Write a part of an array that `create` made, and wait for it.

        Raises:
          OSError: it cannot be written.
        """
        _result(self._opened[name][index].write(values))

    def describe(self, shapes: Shapes) -> None:
        """Write what Orbax needs to know of the tree that the arrays make up."""
        now, nothing = time.time_ns(), dict[str, str]()
        tree = {
            "tree_metadata": {
                str(tuple(name.split("."))): {
                    "key_metadata": [
                        {"key": key, "key_type": _DICT_KEY} for key in name.split(".")
                    ],
                    "value_metadata": {
                        "value_type": "jax.Array",
                        "skip_deserialize": False,
                        "write_shape": shape,
                    },
                }
                for name, shape in shapes.items()
            },
            "use_ocdbt": True,
            "use_zarr3": False,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }
        checkpoint = {
            "item_handlers": _HANDLER,
            "metrics": nothing,
            "performance_metrics": nothing,
            "init_timestamp_nsecs": now,
            "commit_timestamp_nsecs": now,
            "custom_metadata": nothing,
        }
        (self._directory / _TREE).write_text(json.dumps(tree))
        (self._directory / _CHECKPOINT).write_text(json.dumps(checkpoint))

    def commit(self) -> None:
        """Say that all is written; in a bucket Orbax reads nothing without it."""
        (self._directory / _COMMITTED).write_text("Written chunk by chunk.\n")

    def _store(self, name: str, *, ocdbt: bool) -> dict[str, Any]:
        path = str(self._directory)
        if path.startswith("gs://"):
            bucket, _, prefix = path.removeprefix("gs://").partition("/")
            base = {"driver": "gcs", "bucket": bucket, "path": f"{prefix}/"}
        else:
            base = {"driver": "file", "path": f"{path}/"}
        if not ocdbt:
            return base | {"path": f"{base['path']}{name}/"}
        return {
            "driver": "ocdbt",
            "base": base,
            "path": f"{name}/",
            "target_data_file_size": _DATA_FILE_BYTES,
        }


def _result(written: Any) -> Any:
    """What TensorStore promised; it reports the system's errors as text."""
    try:
        return written.result()
    except ValueError as error:
        full = "No space left" in str(error) or "quota" in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error)) from error
