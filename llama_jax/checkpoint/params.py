"""Parameters alone: what `llm.save` writes, and a part of every training checkpoint.

DIRECTORY/architecture.json   the LlamaConfig
DIRECTORY/tokenizer.model     if there is one
DIRECTORY/params/             Orbax; written last, and whole or not at all
"""

import dataclasses
import json
import logging
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from llama_jax.config import LlamaConfig
from llama_jax.errors import CheckpointError, ConfigError
from llama_jax.model.count import abstract_params
from llama_jax.text.tokenizer import Tokenizer
from sharding.axes import Tree

ARCHITECTURE = "architecture.json"
TOKENIZER = "tokenizer.model"
PARAMS = "params"


@dataclasses.dataclass(frozen=True)
class ParamsCheckpoint:
    """Parameters on disk, opened but not read.

    Attributes:
      directory: of Orbax's own files.
      config: the architecture they belong to.
      dtype: what they are stored in.
      tokenizer_path: the tokenizer that came with them, if one did.
    """

    directory: epath.Path
    config: LlamaConfig
    dtype: jnp.dtype
    tokenizer_path: epath.Path | None

    def load(self, shardings: Tree, *, dtype: jnp.dtype) -> Tree:
        """The parameters, each device reading only its own part.

        Raises:
          CheckpointError: files are damaged or missing.
        """
        target = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(
                leaf.shape, dtype, sharding=sharding
            ),
            abstract_params(self.config),
            shardings,
        )
        try:
            with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
                return checkpointer.restore(
                    self.directory, args=ocp.args.StandardRestore(target)
                )
        except (ValueError, OSError, KeyError) as error:
            raise CheckpointError(
                f"{self.directory} cannot be read: {first_line(error)}. Files of it "
                "are damaged or missing: copy or save it again."
            ) from error


def place(path: epath.PathLike) -> epath.Path:
    """A path that can be used from here: a local one, or one in a bucket.

    Raises:
      CheckpointError: the package that reads such buckets is not installed.
    """
    try:
        found = epath.Path(path)
        found.exists()
    except ImportError as error:
        raise CheckpointError(
            f"{path} is in a bucket, and the package that reads it is not installed "
            f"({error}): for gs:// paths, pip install 'llama-jax[gcs]'."
        ) from error
    return found


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
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            checkpointer.save(
                (directory / PARAMS).absolute(), args=ocp.args.StandardSave(params)
            )
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be written: {error}.") from error


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
    directory = epath.Path(directory).absolute()
    found = _stored(directory)
    expected = {
        _dotted(path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config))
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
    dtypes = sorted({str(leaf.dtype) for leaf in found.values()})
    if len(dtypes) > 1:
        logging.getLogger(__name__).warning(
            "%s mixes %s; read as %s.", directory, ", ".join(dtypes), dtypes[-1]
        )
    return ParamsCheckpoint(directory, config, jnp.dtype(dtypes[-1]), tokenizer)


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
