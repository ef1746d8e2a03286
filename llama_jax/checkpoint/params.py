"""Parameters alone: what `llm.save` writes, and a part of every training checkpoint.

DIRECTORY/architecture.json   the LlamaConfig
DIRECTORY/tokenizer.model     if there is one
DIRECTORY/params/             Orbax; written last, and whole or not at all
"""

import dataclasses
import functools
import json
import logging
import math
from collections.abc import Callable, Iterable, Sequence, Set
from typing import Any, Literal

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from etils.epath import backend
from jax.experimental import multihost_utils

from llama_jax.checkpoint.arrays import Arrays
from llama_jax.checkpoint.values import all_finite
from llama_jax.config import LlamaConfig
from llama_jax.config.model import Head
from llama_jax.errors import CheckpointError, ConfigError
from llama_jax.model.count import abstract_params
from llama_jax.text.tokenizer import Tokenizer
from sharding.axes import Tree

_log = logging.getLogger(__name__)

ARCHITECTURE = "architecture.json"
TOKENIZER = "tokenizer.model"
PARAMS = "params"
_CHUNK_BYTES = 2**25


@dataclasses.dataclass(frozen=True)
class ParamsCheckpoint:
    """Parameters on disk, opened but not read.

    Attributes:
      directory: of Orbax's own files.
      config: the architecture they belong to.
      dtype: what they are stored in.
      tokenizer_path: the tokenizer that came with them, if one did.
      head: what their model ends with.
    """

    directory: epath.Path
    config: LlamaConfig
    dtype: jnp.dtype
    tokenizer_path: epath.Path | None
    head: Head = "unembed"

    @property
    def format(self) -> Literal["orbax"]:
        """Whose files these are."""
        return "orbax"

    @property
    def files(self) -> tuple[epath.Path, ...]:
        """What changes when the parameters do."""
        listed = (self.directory / name for name in ("manifest.ocdbt", "_METADATA"))
        return tuple(file for file in listed if file.exists())

    @functools.cached_property
    def _arrays(self) -> Arrays:
        return Arrays(self.directory)

    @functools.cached_property
    def _not_finite(self) -> set[str]:
        return set()

    def read(
        self,
        path: str,
        index: tuple[slice, ...] = (),
        *,
        dtype: jnp.dtype | None = None,
    ) -> np.ndarray:
        """One leaf, or a slice of it, in memory.

        Values that are not finite are logged as a warning, once for a leaf.

        Args:
          path: of the leaf ("blocks/attention/query").
          index: a slice with step 1 for each leading axis; the rest are whole.
          dtype: of the result, if not that of the files.

        Raises:
          CheckpointError: files are damaged or missing.
        """
        dtype = self.dtype if dtype is None else dtype
        try:
            array = self._arrays.open(path.replace("/", "."))
            part: np.ndarray = array[index or ...].read().result()
        except (ValueError, OSError, KeyError) as error:
            raise self._unreadable(error) from error
        if path not in self._not_finite and not all_finite(part):
            self._not_finite.add(path)
            _log.warning("%s: NaN or infinity in %s.", self.directory, path)
        return part.astype(dtype, copy=False)

    def load(self, shardings: Tree, *, dtype: jnp.dtype) -> Tree:
        """The parameters, each host reading only what its devices hold.

        Raises:
          CheckpointError: files are damaged or missing.
        """
        shapes = abstract_params(self.config, self.head)
        return load_leaves(self.read, shapes, shardings, dtype=dtype)

    def _unreadable(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{self.directory} cannot be read: {first_line(error)}. Files of it are "
            "damaged or missing: copy or save it again."
        )


def load_leaves(
    read: Callable[..., np.ndarray],
    leaves: Tree,
    shardings: Tree,
    *,
    dtype: jnp.dtype,
) -> Tree:
    """All parameters, each host reading only what its devices hold, and that once.

    What one host holds of one leaf is in memory beside the leaves done: restoring by
    Orbax holds as much as all leaves of the host are.

    Args:
      read: a checkpoint's method: a leaf by its path, or the part at an index.
      leaves: a tree of what has the shape of each.
      shardings: a tree of where the parts of each go.
      dtype: of the result.
    """

    def load(
        path: tuple[Any, ...],
        leaf: jax.ShapeDtypeStruct,
        sharding: jax.sharding.Sharding,
    ) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        held = sharding.addressable_devices_indices_map(leaf.shape)
        parts = {
            device: tuple(
                range(size)[part]
                for part, size in zip(index or (), leaf.shape, strict=True)
            )
            for device, index in held.items()
        }
        arrays = []
        for box in _boxes(set(parts.values())):
            index = tuple(slice(side.start, side.stop) for side in box)
            content = read(name, index, dtype=dtype)
            if not content.flags.writeable:
                # Mapped. A CPU's array would be these bytes, and change with the file.
                content = np.array(content)
            for device, part in parts.items():
                if all(map(_is_inside, part, box)):
                    inside = tuple(
                        slice(side.start - first.start, side.stop - first.start)
                        for side, first in zip(part, box, strict=True)
                    )
                    block = np.ascontiguousarray(content[inside])
                    arrays.append(jax.device_put(block, device).block_until_ready())
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)

    return jax.tree_util.tree_map_with_path(load, leaves, shardings)


def _boxes(parts: Set[tuple[range, ...]]) -> list[tuple[range, ...]]:
    """What to read for these parts: one box, if they fill it; else each by itself."""

    def size(box: Sequence[range]) -> int:
        return math.prod(map(len, box))

    around = tuple(
        range(min(side.start for side in sides), max(side.stop for side in sides))
        for sides in zip(*parts, strict=True)
    )
    return [around] if size(around) <= sum(map(size, parts)) else sorted(parts, key=str)


def _is_inside(part: range, box: range) -> bool:
    return box.start <= part.start and part.stop <= box.stop


def place(path: epath.PathLike) -> epath.Path:
    """A path that can be used from here: a local one, or one in a bucket.

    Of a bucket, what others have written by now is seen.

    Raises:
      CheckpointError: the package that reads such buckets is not installed; the bucket
        does not exist, or may not be read.
    """
    try:
        found = epath.Path(path)
        if is_remote(found):
            filesystem(found).invalidate_cache()
        found.exists()
    except ImportError as error:
        raise CheckpointError(
            f"{path} is in a bucket, and the package that reads it is not installed "
            f"({error}): for gs:// paths, pip install 'llama-jax[gcs]'."
        ) from error
    except Exception as error:  # what a bucket's client raises has no common kind
        raise CheckpointError(
            f"{path} cannot be looked at: {first_line(error)}. Check the name, and "
            "that you may read it (gcloud auth application-default login)."
        ) from error
    return found


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path is in a bucket."""
    return "://" in str(path)


def absolute(path: epath.Path) -> epath.Path:
    """The path from the root of a disk; epath would put a bucket on the disk too."""
    return path if is_remote(path) else path.absolute()


def filesystem(path: epath.Path) -> fsspec.AbstractFileSystem:
    """What epath reads a bucket through, for what epath itself has no way to ask."""
    return backend.fsspec_backend.fs(path)


def save_params(
    directory: epath.PathLike,
    params: Tree,
    config: LlamaConfig,
    tokenizer: Tokenizer | None,
) -> None:
    """Write parameters, architecture and tokenizer; every host writes its own part.

    Raises:
      CheckpointError: the directory holds something already, or cannot be written.
    """
    directory = place(directory)
    if directory.exists() and not all(map(_is_unfinished, directory.iterdir())):
        raise CheckpointError(
            f"{directory} is not empty: choose another place, or remove it first."
        )
    # All hosts have looked before the first one writes.
    multihost_utils.sync_global_devices("save_params")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            text = json.dumps(dataclasses.asdict(config), indent=2)
            (directory / ARCHITECTURE).write_text(text + "\n")
            if tokenizer is not None:
                (directory / TOKENIZER).write_bytes(tokenizer.model_bytes)
        with ocp.Checkpointer(uncompressed()) as checkpointer:
            checkpointer.save(absolute(directory / PARAMS), args=in_chunks(params))
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be written: {error}.") from error


def uncompressed() -> ocp.PyTreeCheckpointHandler:
    """What writes trees of numbers that are as good as random.

    Compressed, as Orbax does by itself, weights lose a twelfth of their size, and take
    twice as long to load.
    """
    return ocp.PyTreeCheckpointHandler(use_compression=False)


def in_chunks(params: Tree) -> ocp.args.PyTreeSave:
    """What Orbax is to save, each layer in chunks of its own.

    An array that one device holds would be one chunk, and a chunk is read whole: of a
    stacked matrix, to get at one layer.
    """

    def chunks(path: tuple[Any, ...], leaf: jax.Array) -> ocp.SaveArgs:
        if leaf.ndim < 2:
            return ocp.SaveArgs()
        # Orbax cuts such an axis into single places: layers, but no rows of a table.
        axes = (0,) if path[0].key == "blocks" else ()
        return ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=axes)

    save_args = jax.tree_util.tree_map_with_path(chunks, params)
    return ocp.args.PyTreeSave(params, save_args=save_args)


def _is_unfinished(entry: epath.Path) -> bool:
    """Whether a file is one that an interrupted save leaves; `params` comes last."""
    return entry.name in (ARCHITECTURE, TOKENIZER) or entry.name.startswith(
        f"{PARAMS}."
    )


def open_params(directory: epath.PathLike) -> ParamsCheckpoint:
    """Open what `save_params` wrote, and check that it is what it says.

    Raises:
      CheckpointError: it is incomplete, or of another architecture than it says.
    """
    directory = epath.Path(directory)
    try:
        fields = json.loads((directory / ARCHITECTURE).read_text())
        config = LlamaConfig(**fields)
    except (OSError, TypeError, json.JSONDecodeError, ConfigError) as error:
        raise CheckpointError(f"{directory / ARCHITECTURE}: {error}.") from error
    tokenizer = directory / TOKENIZER
    return open_orbax(
        directory / PARAMS, config, tokenizer if tokenizer.exists() else None
    )


def open_orbax(
    directory: epath.PathLike, config: LlamaConfig, tokenizer: epath.Path | None
) -> ParamsCheckpoint:
    """Open a tree of parameters that Orbax wrote, given its architecture.

    Raises:
      CheckpointError: a parameter is missing, superfluous or of another shape. (Orbax
        by itself restores another shape without a word.)
    """
    directory = absolute(epath.Path(directory))
    found = _stored(directory)
    head: Head = "scalar" if "scalar.kernel" in found else "unembed"
    shapes = abstract_params(config, head)
    expected = {
        _dotted(path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    }
    wrong = [
        f"{name} is {found[name].shape if name in found else 'missing'}, expected "
        f"{expected.get(name, 'nothing')}"
        for name in sorted(expected.keys() | found.keys())
        if name not in found or tuple(found[name].shape) != expected.get(name)
    ]
    if wrong:
        raise CheckpointError(
            f"{directory} does not hold the model it says: {'; '.join(wrong[:3])}"
            f"{f'; and {len(wrong) - 3} more' if len(wrong) > 3 else ''}."
        )
    dtypes = {jnp.dtype(leaf.dtype) for leaf in found.values()}
    widest = jnp.dtype(jnp.result_type(*dtypes))
    if len(dtypes) > 1:
        mixed = ", ".join(sorted(map(str, dtypes)))
        _log.warning(
            "%s mixes %s; read as %s, which holds each exactly.",
            directory,
            mixed,
            widest,
        )
    return ParamsCheckpoint(directory, config, widest, tokenizer, head)


def _stored(directory: epath.Path) -> dict[str, ocp.metadata.ArrayMetadata]:
    if not directory.exists():
        raise CheckpointError(
            f"{directory} does not exist: saving was interrupted before it was whole, "
            "or this is no checkpoint."
        )
    try:
        handler = ocp.StandardCheckpointHandler()
        tree = handler.metadata(directory).tree
    except (ValueError, OSError, KeyError) as error:
        raise CheckpointError(
            f"{directory} cannot be read: {first_line(error)}."
        ) from error
    return {
        _dotted(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _dotted(path: Iterable[jax.tree_util.DictKey]) -> str:
    return ".".join(str(step.key) for step in path)


def first_line(error: Exception) -> str:
    """The beginning of a library's message, which may fill pages."""
    line, *_ = str(error).splitlines() or [type(error).__name__]
    return line if len(line) < 160 else f"{line[:160]}…"
