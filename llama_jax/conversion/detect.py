"""What a checkpoint is, found out by what is in it."""

from etils import epath

from llama_jax.checkpoint.manager import CHECKPOINTS, open_run
from llama_jax.checkpoint.params import (
    ARCHITECTURE,
    ParamsCheckpoint,
    open_params,
    place,
)
from llama_jax.conversion.hf import is_hf, read_hf, snapshot
from llama_jax.conversion.journal import JOURNAL
from llama_jax.conversion.meta import read_meta
from llama_jax.conversion.stored import TensorCheckpoint
from llama_jax.errors import CheckpointError

AnyCheckpoint = TensorCheckpoint | ParamsCheckpoint


def open_checkpoint(path: epath.PathLike, *, max_length: int) -> AnyCheckpoint:
    """Open the checkpoint of a model that writes, without reading its weights.

    Args:
      path: a directory.
      max_length: the context in tokens, where the files do not say.

    Raises:
      CheckpointError: it does not exist, is not known, or is damaged; or it is a reward
        model.
    """
    source = open_any(path, max_length=max_length)
    if source.head != "unembed":
        raise CheckpointError(
            f"{path} is a reward model, which scores answers and writes none: give the "
            "model that writes, or score with llama_jax.finetune.reward.load_reward."
        )
    return source


def open_any(path: epath.PathLike, *, max_length: int) -> AnyCheckpoint:
    """Open a checkpoint whatever its model ends with, which its `head` says.

    Arguments and errors are those of `open_checkpoint`.
    """
    directory = place(path)
    if not directory.exists():
        raise CheckpointError(f"{path} does not exist: check the path.")
    if not directory.is_dir():
        raise CheckpointError(
            f"{path} is a file: give the directory that the checkpoint's files are in."
        )
    directory = snapshot(directory)
    names = {entry.name for entry in directory.iterdir()}
    if JOURNAL in names:
        raise CheckpointError(
            f"{path} is being written by a conversion, or by one that was stopped: "
            "run it again, and it goes on."
        )
    meta = any(name.startswith("consolidated.") for name in names)
    if meta and is_hf(names):
        raise CheckpointError(
            f"{path} holds Meta's files and Hugging Face's: move one of the two to a "
            "directory of its own, so that it is clear which is meant."
        )
    if meta:
        return read_meta(directory, max_length=max_length)
    if is_hf(names):
        return read_hf(directory)
    if ARCHITECTURE in names:
        return open_params(directory)
    if CHECKPOINTS in names or {"params", "recipe"} <= names:
        return open_run(directory)
    found = ", ".join(sorted(names)[:8]) or "nothing"
    raise CheckpointError(
        f"{path} is no checkpoint of a kind that is known: it holds {found}. Known are "
        "Meta's directories (consolidated.00.pth, params.json), Hugging Face's "
        f"(model.safetensors, config.json), what `save` wrote ({ARCHITECTURE}) and the "
        f"work directory of a run ({CHECKPOINTS})."
    )
