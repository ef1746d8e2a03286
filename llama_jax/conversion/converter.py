"""`convert`: a checkpoint of any format to any other, in bounded memory, proven.

Until the last step, a rename, there is no target; and a conversion that was stopped
goes on where it was. In a bucket, where nothing is renamed, the journal hides what is
there until the last step, and what makes a checkpoint of it for others comes late.
"""

import contextlib
import dataclasses
import errno
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, get_args

import jax.numpy as jnp
from etils import epath

from llama_jax.checkpoint.params import absolute, open_params, place
from llama_jax.config import LlamaConfig
from llama_jax.conversion import names
from llama_jax.conversion.detect import AnyCheckpoint, open_checkpoint
from llama_jax.conversion.files import is_remote
from llama_jax.conversion.hf import read_hf
from llama_jax.conversion.journal import JOURNAL, Journal
from llama_jax.conversion.manifest import Manifest
from llama_jax.conversion.meta import read_meta, require_divisible
from llama_jax.conversion.proof import (
    read_digests,
    require_digests,
    require_files,
    require_same_logits,
)
from llama_jax.conversion.stored import FLOATS, listed
from llama_jax.conversion.targets import HfTarget, MetaTarget, OrbaxTarget, Target
from llama_jax.conversion.transfer import Transfer, Watch
from llama_jax.errors import CheckpointError, ConfigError, LlamaError
from llama_jax.model import num_params
from llama_jax.text import Tokenizer
from llama_jax.text.tokenizer import require_fit

_log = logging.getLogger(__name__)

To = Literal["orbax", "meta", "hf"]
# What a disk has to have free beside the weights.
_SPARE_BYTES = 2**22


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
      source: the format found.
      target: where the result is.
      manifest: digests of every weight, also written beside them.
      num_bytes: of all weights.
      num_resumed: weights that an earlier, stopped conversion had written.
      seconds: from the first byte read to the last one safe on the disk.
      proof_seconds: for reading back and comparing logits; None if it was not done.
      logits_apart: between both ends, relative to the largest logit or 1; likewise.
    """

    source: str
    target: epath.Path
    manifest: Manifest
    num_bytes: int
    num_resumed: int
    seconds: float
    proof_seconds: float | None
    logits_apart: float | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """A conversion about which all is known that can be known before it begins.

    Attributes:
      source: opened, unread.
      target: where the result appears.
      work: where it is made.
      to: its format.
      model_parallel: its shards, if it is Meta's.
      dtype: of its values.
      tokenizer: that goes with it.
    """

    source: AnyCheckpoint
    target: epath.Path
    work: epath.Path
    to: To
    model_parallel: int
    dtype: jnp.dtype
    tokenizer: Tokenizer | None

    @property
    def config(self) -> LlamaConfig:
        """The architecture."""
        return self.source.config

    @property
    def num_bytes(self) -> int:
        """Of all weights, as written."""
        return num_params(self.config) * self.dtype.itemsize

    @property
    def task(self) -> Mapping[str, Any]:
        """What a stopped conversion must have been about to be gone on with."""
        return {
            "source": str(absolute(self.source.directory)),
            "files": [_identity(file) for file in self.source.files],
            "to": self.to,
            "model_parallel": self.model_parallel,
            "dtype": str(self.dtype),
        }

    def begin(self) -> Target:
        """The target, or what is there of it."""
        if self.to == "meta":
            shards = self.model_parallel
            return MetaTarget(self.work, self.config, self.dtype, shards)
        kind = HfTarget if self.to == "hf" else OrbaxTarget
        return kind(self.work, self.config, self.dtype)

    def open_result(self) -> AnyCheckpoint:
        """What was written, opened as anyone would."""
        if self.to == "meta":
            return read_meta(self.work, max_length=self.config.max_length)
        return read_hf(self.work) if self.to == "hf" else open_params(self.work)


def convert(
    source: epath.PathLike,
    target: epath.PathLike,
    *,
    to: To,
    model_parallel: int | None = None,
    dtype: str | None = None,
    verify: bool = True,
    overwrite: bool = False,
    strict: bool = False,
    max_length: int = 4096,
    tokenizer: epath.PathLike | None = None,
    watch: Watch | None = None,
) -> Conversion:
    """Convert a checkpoint.

    Memory stays under a few hundred megabytes, whatever the size of the model.

    Args:
      source: a directory of Meta's, of Hugging Face's, what `save` wrote, or the work
        directory of a run; here or in a bucket.
      target: a directory that is empty or does not exist.
      to: its format, "orbax", "meta" or "hf".
      model_parallel: shards of Meta's format; 1 if not given.
      dtype: of the result, "bfloat16", "float16" or "float32"; that of the source if
        not given.
      verify: read the result back and compare digests and logits, before it appears.
      overwrite: replace what is at the target, once the new one is whole; in a bucket,
        where there is no other place for it, before.
      strict: refuse weights that are NaN or infinite, which otherwise is a warning.
      max_length: the context in tokens, where the source does not say.
      tokenizer: `tokenizer.model`, if it is not beside the source's weights.
      watch: called with a phase, bytes done and bytes in all.

    Raises:
      CheckpointError: the source is damaged or not known; the target exists or cannot
        be written; a value overflows its type; what was written is not what was read.
      ConfigError: an option that cannot be.
      TokenizerError: the tokenizer does not fit the model.
    """
    plan = make_plan(
        source,
        target,
        to=to,
        model_parallel=model_parallel,
        dtype=dtype,
        overwrite=overwrite,
        max_length=max_length,
        tokenizer=tokenizer,
    )
    watch = watch or (lambda *_: None)
    with _errors_of_the_target(plan), _journal(plan) as journal:
        start = time.monotonic()
        num_resumed = _write(plan, journal, strict=strict, watch=watch)
        digests = {w.name: journal.done[w.name] for w in names.weights(plan.config)}
        manifest = Manifest(plan.source.format, to, str(plan.dtype), digests)
        manifest.write(plan.work)
        _make_durable(plan.work)
        seconds = time.monotonic() - start
        apart = _prove(plan, manifest, watch) if verify else None
        proof_seconds = time.monotonic() - start - seconds if verify else None
        journal.remove()
        _appear(plan)
    return Conversion(
        source=plan.source.format,
        target=plan.target,
        manifest=manifest,
        num_bytes=plan.num_bytes,
        num_resumed=num_resumed,
        seconds=seconds,
        proof_seconds=proof_seconds,
        logits_apart=apart,
    )


def make_plan(
    source: epath.PathLike,
    target: epath.PathLike,
    *,
    to: To,
    model_parallel: int | None,
    dtype: str | None,
    overwrite: bool,
    max_length: int,
    tokenizer: epath.PathLike | None,
) -> Plan:
    """Open the source and look at all that can be refused before anything is written.

    Raises:
      As `convert`.
    """
    if to not in get_args(To):
        raise ConfigError(f"to {to!r}: give one of {', '.join(get_args(To))}.")
    if model_parallel is not None and to != "meta":
        raise ConfigError(
            f"model_parallel {model_parallel} is of Meta's format, and this one is "
            f"{to}: leave it out."
        )
    opened = open_checkpoint(source, max_length=max_length)
    num_shards = 1 if model_parallel is None else model_parallel
    if num_shards < 1:
        raise ConfigError(f"model_parallel {num_shards}: give 1 or more.")
    require_divisible(opened.config, num_shards, where="the result")
    target = place(target)
    _require_place(opened, target, overwrite=overwrite)
    here = target.absolute()
    work = target if is_remote(target) else here.parent / f".{here.name}.partial"
    return Plan(
        source=opened,
        target=target,
        work=work,
        to=to,
        model_parallel=num_shards,
        dtype=_dtype(opened, dtype),
        tokenizer=_tokenizer(opened, tokenizer),
    )


def _write(plan: Plan, journal: Journal, *, strict: bool, watch: Watch) -> int:
    """Everything but the manifest; returns how many weights were there already."""
    target = plan.begin()
    try:
        transfer = Transfer(
            plan.source,
            target,
            dtype=plan.dtype,
            strict=strict,
            journal=journal,
            watch=watch,
        )
        num_resumed = transfer.take_up()
        # The digest of the source's files is a reading of its own, done beside.
        given_up = threading.Event()
        with ThreadPoolExecutor(1) as aside:
            checked = aside.submit(require_files, plan.source, given_up=given_up)
            try:
                transfer.run()
                target.finish(plan.tokenizer)
                checked.result()
            finally:
                given_up.set()
    finally:
        target.close()
    _require_recorded(plan, journal.done)
    return num_resumed


def _require_recorded(plan: Plan, digests: Mapping[str, str]) -> None:
    """If an earlier conversion made the source, its weights are what that wrote."""
    recorded = Manifest.of(plan.source)
    if recorded is None or recorded.dtype != str(plan.dtype):
        return
    wrong = [name for name in digests if recorded.digests.get(name) != digests[name]]
    if wrong:
        raise CheckpointError(
            f"{plan.source.directory} is damaged: {listed(wrong)} differ from what "
            "its own conversion wrote. Convert or copy it again."
        )


def _prove(plan: Plan, manifest: Manifest, watch: Watch) -> float:
    """Read the result back; returns how far the logits of both ends are apart.

    Raises:
      CheckpointError: a weight differs from what was read, or the logits do.
    """
    result = plan.open_result()
    require_digests(result, read_digests(result, watch=watch), manifest)
    return require_same_logits(plan.source, result)


def _require_place(
    source: AnyCheckpoint, target: epath.Path, *, overwrite: bool
) -> None:
    here, there = target.resolve(), source.directory.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise CheckpointError(
            f"the target {target} is the source, or one is inside the other: choose "
            "another place for the result."
        )
    if not target.exists() or overwrite:
        return
    if not target.is_dir():
        raise CheckpointError(f"{target} is a file: choose a directory.")
    there_now = [entry.name for entry in target.iterdir()]
    if there_now and JOURNAL not in there_now:
        raise CheckpointError(
            f"{target} is not empty: choose another place, or replace what is there "
            "with --overwrite."
        )


def _dtype(source: AnyCheckpoint, dtype: str | None) -> jnp.dtype:
    if dtype is None:
        return source.dtype
    if dtype not in map(str, FLOATS):
        raise ConfigError(
            f"dtype {dtype!r}: give one of {', '.join(map(str, FLOATS))}."
        )
    return jnp.dtype(dtype)


def _tokenizer(source: AnyCheckpoint, path: epath.PathLike | None) -> Tokenizer | None:
    path = source.tokenizer_path if path is None else path
    if path is None:
        _log.warning(
            "%s has no tokenizer.model, so the result has none.", source.directory
        )
        return None
    tokenizer = Tokenizer(path)
    require_fit(tokenizer, source.config.vocab_size)
    return tokenizer


@contextlib.contextmanager
def _journal(plan: Plan) -> Iterator[Journal]:
    """Room for the result, and what is known of what is there.

    What was refused would be refused again, so nothing of it stays; what was stopped
    does.
    """
    plan.work.mkdir(parents=True, exist_ok=True)
    journal = Journal(plan.work, plan.task)
    try:
        if not is_remote(plan.work):
            _require_space(plan)
        yield journal
    except LlamaError:
        if not is_remote(plan.work):
            shutil.rmtree(plan.work)
        raise
    finally:
        journal.close()


def _require_space(plan: Plan) -> None:
    there = sum(os.stat(file).st_blocks * 512 for file in _files(plan.work))
    free = shutil.disk_usage(plan.work).free + there
    if free < plan.num_bytes + _SPARE_BYTES:
        raise CheckpointError(
            f"the disk of {plan.target} has {free / 1e9:.1f} GB free, and the result "
            f"has {plan.num_bytes / 1e9:.1f} GB: make room, or choose another disk."
        )


@contextlib.contextmanager
def _errors_of_the_target(plan: Plan) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        advice = "Run it again, and it goes on from there."
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and not is_remote(plan.work):
            shutil.rmtree(plan.work, ignore_errors=True)
            advice = "Nothing was left there: make room, or choose another disk."
        raise CheckpointError(
            f"{plan.target} cannot be written: {error}. {advice}"
        ) from error


def _make_durable(directory: epath.Path) -> None:
    """On a disk, wait until every file and every name is on it."""
    if is_remote(directory):
        return
    for path in (*_files(directory), *_directories(directory)):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _files(directory: epath.Path) -> list[str]:
    return [
        os.path.join(at, name) for at, _, files in os.walk(directory) for name in files
    ]


def _directories(directory: epath.Path) -> list[str]:
    return [at for at, _, _ in os.walk(directory)]


def _appear(plan: Plan) -> None:
    """Make the result the target, in one step on a disk."""
    if is_remote(plan.work):
        return  # it is where it belongs, and its journal was what hid it
    aside = plan.work.with_name(f".{plan.target.name}.replaced")
    if aside.exists():  # an earlier replacement did not get to its end
        shutil.rmtree(aside)
    if plan.target.exists() and any(plan.target.iterdir()):
        os.rename(plan.target, aside)
    os.rename(plan.work, plan.target)
    if aside.exists():
        shutil.rmtree(aside)


def _identity(file: epath.Path) -> list[str | int | float]:
    stat = file.stat()
    return [file.name, stat.length, float(stat.mtime)]
