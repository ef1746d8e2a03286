"""Hugging Face's checkpoints of a Llama: checked and opened.

`config.json` beside `model.safetensors`, or beside several such files and the index
that lists them; older ones hold PyTorch's files instead, `pytorch_model*.bin`. Files
may be links into a cache, and the directory a cache's own.
"""

import json
import logging
import re
from collections.abc import Callable, Mapping

from etils import epath

from llama_jax.config import LlamaConfig
from llama_jax.conversion.files import Tensor
from llama_jax.conversion.pth import read_pth
from llama_jax.conversion.safetensors import read_safetensors
from llama_jax.conversion.stored import (
    TensorCheckpoint,
    find_tokenizer,
    listed,
    require_tensors,
    without_derived,
)
from llama_jax.errors import CheckpointError

_log = logging.getLogger(__name__)

CONFIG = "config.json"
SAFETENSORS = "model.safetensors"
INDEX_SUFFIX = ".index.json"
_PYTORCH = "pytorch_model.bin"
_READERS: Mapping[str, Callable[[epath.PathLike], Mapping[str, Tensor]]] = {
    SAFETENSORS: read_safetensors,
    _PYTORCH: read_pth,
}
# Early Llama-2-hf repositories carry the rotary frequencies, in float32: a function of
# the configuration, so the model computes them.
_DERIVED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_SNAPSHOTS = "snapshots"


def is_hf(names: set[str]) -> bool:
    """Whether a directory with these entries is one of Hugging Face's."""
    weights = {*_READERS, *(name + INDEX_SUFFIX for name in _READERS)}
    return bool(names & weights)


def snapshot(directory: epath.Path) -> epath.Path:
    """The directory itself; of a cache of a model, the revision that it holds.

    Raises:
      CheckpointError: the cache holds several revisions, and none is called main.
    """
    revisions = directory / _SNAPSHOTS
    if not revisions.is_dir():
        return directory
    main = directory / "refs" / "main"
    found = sorted(entry.name for entry in revisions.iterdir())
    revision = main.read_text().strip() if main.exists() else "".join(found)
    if revision not in found:
        raise CheckpointError(
            f"{directory} is a cache with the revisions {', '.join(found) or 'none'}: "
            f"give one of them, {revisions}/REVISION."
        )
    _log.info("%s is a cache: its revision %s.", directory, revision)
    return revisions / revision


def read_hf(directory: epath.PathLike) -> TensorCheckpoint:
    """Open a directory of Hugging Face's, checking all but the values of its weights.

    Args:
      directory: local files are mapped into memory, a bucket's read by range.

    Raises:
      CheckpointError: a file is missing, damaged or does not belong here, or the
        tensors are not those of the model that `config.json` describes.
      ConfigError: `config.json` cannot be used, or is no Llama 2's.
    """
    directory = epath.Path(directory)
    config = LlamaConfig.from_hf_config(directory / CONFIG)
    kind = _kind(directory)
    files = _weight_files(directory, kind)
    tensors: dict[str, Tensor] = {}
    for file in files:
        found = _READERS[kind](file)
        if twice := tensors.keys() & found.keys():
            raise CheckpointError(
                f"{file} has {listed(twice)}, which another file of {directory} has "
                "too: copy the files of one model, and only those."
            )
        tensors |= found
    derived = filter(_DERIVED.fullmatch, tensors)
    shard = without_derived(directory, tensors, derived)
    require_tensors(config, "hf", shard, directory, 1)
    tokenizer = find_tokenizer(directory)
    if tokenizer is None and (directory / "tokenizer.json").exists():
        _log.warning(
            "%s has a tokenizer.json but no tokenizer.model, and Llama's is a "
            "SentencePiece model: copy tokenizer.model here, or name one.",
            directory,
        )
    return TensorCheckpoint("hf", directory, files, config, tokenizer, [shard])


def _kind(directory: epath.Path) -> str:
    """Which of the kinds of files holds the weights; safetensors before PyTorch's."""
    there = [
        kind
        for kind in _READERS
        if (directory / kind).exists() or (directory / (kind + INDEX_SUFFIX)).exists()
    ]
    if not there:
        raise CheckpointError(
            f"{directory} has no {SAFETENSORS} and no {SAFETENSORS}{INDEX_SUFFIX}: "
            "give the directory of a model, with its weights."
        )
    if len(there) > 1:
        _log.info("%s: read %s, not %s.", directory, *there)
    return there[0]


def _weight_files(directory: epath.Path, kind: str) -> list[epath.Path]:
    """The one file, or those of the index, each of which is there."""
    index = directory / (kind + INDEX_SUFFIX)
    if not index.exists():
        return [directory / kind]
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        file_names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} is no index of tensors ({error!r:.100}): copy it again."
        ) from error
    for name in file_names:
        if not isinstance(name, str) or "/" in name or not name:
            raise CheckpointError(f"{index} lists {name!r:.80}, which is no file name.")
        if not (directory / name).exists():
            raise CheckpointError(
                f"{directory / name} is missing, but {index.name} lists it: copy it "
                "here. (A link that leads nowhere is a download that was not finished.)"
            )
    stem = kind.partition(".")[0]
    pattern = re.compile(rf"{stem}-\d+-of-\d+\.\w+")
    for entry in directory.iterdir():
        if pattern.fullmatch(entry.name) and entry.name not in file_names:
            if entry.name.endswith(kind.rpartition(".")[2]):
                raise CheckpointError(
                    f"{index} does not list {entry.name}: the file is of another "
                    "model, or the index is incomplete. Copy the directory again."
                )
    return [directory / name for name in file_names]
