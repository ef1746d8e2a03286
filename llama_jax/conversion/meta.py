"""Meta's checkpoints: a directory of model-parallel shards, checked and opened.

A released model is `params.json`, `consolidated.NN.pth` for each shard,
`tokenizer.model` (here or one directory up) and `checklist.chk`, the MD5 of the files.
Everything that can be wrong is looked for before any weight is used.
"""

import contextlib
import hashlib
import json
import logging
import re
import threading
from collections.abc import Mapping, Sequence

from etils import epath

from llama_jax.config import LlamaConfig
from llama_jax.conversion import names
from llama_jax.conversion.pth import read_pth
from llama_jax.conversion.stored import (
    Shard,
    TensorCheckpoint,
    find_tokenizer,
    require_tensors,
    without_derived,
)
from llama_jax.errors import CheckpointError

_log = logging.getLogger(__name__)

PARAMS = "params.json"
CHECKLIST = "checklist.chk"
# The rotary frequencies that some releases carry, rounded to 16 bits: a function of
# the configuration, so the model computes them, exactly.
_DERIVED = re.compile(r"(layers\.\d+\.attention\.inner_attention\.)?rope\.freqs")
_SHARD = re.compile(r"consolidated\.\d\d\.pth$")
_CHECKLIST_LINE = re.compile(r"([0-9a-f]{32}) [ *](\S.*)")
_BLOCK = 2**22


def read_meta(directory: epath.PathLike, *, max_length: int) -> TensorCheckpoint:
    """Open a directory of Meta's, checking all of it but the values of its weights.

    The files' digests are not compared: see `verify_checklist`.

    Args:
      directory: local shards are mapped into memory, a bucket's read by range.
      max_length: the context in tokens, which Meta's files do not state.

    Raises:
      CheckpointError: a file is missing, damaged or does not belong here, or the
        tensors are not those of the model that `params.json` describes.
      ConfigError: `params.json` cannot be used.
    """
    directory = epath.Path(directory)
    files = _shard_files(directory)
    _require_listed(directory, files)
    shards = [_read_shard(file) for file in files]
    config = _read_config(directory, shards, max_length)
    require_divisible(config, len(shards), where=directory)
    for file, shard in zip(files, shards, strict=True):
        require_tensors(config, "meta", shard, file, len(shards))
        _require_same_copies(config, shard, shards[0], file)
    tokenizer = find_tokenizer(directory)
    return TensorCheckpoint("meta", directory, files, config, tokenizer, shards)


def file_name(number: int) -> str:
    """The name of a shard's file."""
    return f"consolidated.{number:02d}.pth"


def verify_checklist(
    directory: epath.Path,
    *,
    share: int = 0,
    of: int = 1,
    given_up: threading.Event | None = None,
) -> None:
    """Compare files with the MD5 beside them, which finds what no format here would.

    Args:
      directory: where `checklist.chk` is, or is not, of which `read_meta` warns.
      share: which of the listed files, where several hosts share the work.
      of: among how many.
      given_up: ends the reading early, once it is set.

    Raises:
      CheckpointError: a file is damaged.
    """
    listed = list(_read_checklist(directory / CHECKLIST).items())[share::of]
    found = md5s([file for file, _ in listed], given_up=given_up)
    if given_up is not None and given_up.is_set():
        return
    for (file, digest), md5 in zip(listed, found, strict=True):
        if md5 != digest:
            raise CheckpointError(
                f"{file} is damaged: its MD5 is {md5}, {CHECKLIST} says {digest}. "
                "Copy it again."
            )


def md5s(
    files: Sequence[epath.Path], *, given_up: threading.Event | None = None
) -> list[str]:
    """The digests of files; of parts of them, if that is given up.

    A block of each in turn, as a conversion reads shards, so that what one of the two
    has read from the disk is still in memory for the other.
    """
    digests = [hashlib.md5(usedforsecurity=False) for _ in files]
    with contextlib.ExitStack() as opened:
        left = {
            number: opened.enter_context(file.open("rb"))
            for number, file in enumerate(files)
        }
        while left and not (given_up is not None and given_up.is_set()):
            for number, stream in list(left.items()):
                block = stream.read(_BLOCK)
                digests[number].update(block)
                if not block:
                    del left[number]
    return [digest.hexdigest() for digest in digests]


def require_divisible(config: LlamaConfig, num_shards: int, *, where: object) -> None:
    """See to it that shards divide every size that Meta splits.

    Raises:
      CheckpointError: one is not divided.
    """
    sizes = {
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "dim": config.dim,
        "hidden_dim": config.hidden_dim,
        "vocab_size": config.vocab_size,
    }
    for name, size in sizes.items():
        if size % num_shards:
            fit = [
                n
                for n in range(1, config.num_kv_heads + 1)
                if all(size % n == 0 for size in sizes.values())
            ]
            raise CheckpointError(
                f"{where} has {num_shards} shards, which do not divide {name} {size}: "
                f"this model divides into {fit}."
            )


def _require_listed(directory: epath.Path, files: Sequence[epath.Path]) -> None:
    """The checklist names every shard, and what it names is there."""
    checklist = directory / CHECKLIST
    if not checklist.exists():
        _log.warning(
            "%s has no checklist.chk, so damage would go unnoticed.", directory
        )
        return
    digests = _read_checklist(checklist)
    for file in files:
        if file not in digests:
            raise CheckpointError(
                f"{checklist} does not list {file.name}: the shard is of another "
                "model, or the list is incomplete. Copy the directory again."
            )
    for file in digests:
        if not file.is_file():
            raise CheckpointError(
                f"{file} is missing, but {checklist.name} lists it: copy it here."
            )


def _read_checklist(checklist: epath.Path) -> Mapping[epath.Path, str]:
    """The digest of each listed file; none without a list."""
    digests: dict[epath.Path, str] = {}
    if not checklist.exists():
        return digests
    for line in checklist.read_bytes().decode(errors="replace").split("\n"):
        if not line.strip():
            continue
        entry = _CHECKLIST_LINE.fullmatch(line.rstrip())
        if entry is None:
            raise CheckpointError(
                f"{checklist}: the line {line[:80]!r} is not an MD5 and a file name: "
                "copy it again, or remove it to load unverified."
            )
        digests[checklist.parent / entry[2]] = entry[1]
    return digests


def _shard_files(directory: epath.Path) -> list[epath.Path]:
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory} is not a directory: give the one that holds params.json and "
            f"{file_name(0)}."
        )
    found = sorted(path.name for path in directory.iterdir() if _SHARD.match(path.name))
    if not found:
        raise CheckpointError(
            f"{directory} has no {file_name(0)}: give a directory as Meta releases it."
        )
    for number, name in enumerate(found):
        if name != file_name(number):
            raise CheckpointError(
                f"{directory} has {', '.join(found)} but no {file_name(number)}: "
                "copy all the shards of one model, and only those."
            )
    return [directory / name for name in found]


def _read_shard(file: epath.Path) -> Shard:
    tensors = read_pth(file)
    return without_derived(file, tensors, filter(_DERIVED.fullmatch, tensors))


def _read_config(
    directory: epath.Path, shards: Sequence[Shard], max_length: int
) -> LlamaConfig:
    file = directory / PARAMS
    embedding = shards[0].get("tok_embeddings.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(
            f"{directory / file_name(0)} has no matrix tok_embeddings.weight: these "
            "are not the weights of a Llama as Meta stores them."
        )
    rows = embedding.shape[0]
    config = LlamaConfig.from_params_json(file, max_length=max_length, vocab_size=rows)
    if json.loads(file.read_text(encoding="utf-8")).get("vocab_size", -1) == -1:
        _log.info("%s: vocab_size %d, the rows of tok_embeddings.weight.", file, rows)
    return config


def _require_same_copies(
    config: LlamaConfig, shard: Shard, first: Shard, file: epath.Path
) -> None:
    """What every shard has a copy of is the same in all."""
    for weight in names.weights(config):
        form = weight.parameter.meta
        name = weight.stored_name(form)
        # As bytes, so that a NaN equals itself.
        if not form.split and shard[name][:].tobytes() != first[name][:].tobytes():
            raise CheckpointError(
                f"{file}: {name} differs from that of {file_name(0)}, but every "
                "shard has a copy of it: copy all the shards of one model."
            )
