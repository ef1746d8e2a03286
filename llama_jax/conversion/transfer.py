"""The weights of a checkpoint, on their way into another one.

Each weight goes slab by slab: read, checked, rounded, digested, written. Several are on
their way at once where the target allows it; none is ever whole in memory.
"""

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np

from llama_jax.checkpoint.values import all_finite, round_to
from llama_jax.conversion import names
from llama_jax.conversion.journal import Journal
from llama_jax.conversion.manifest import Checkpoint, as_bytes, digest, matrices
from llama_jax.conversion.targets import Target
from llama_jax.errors import CheckpointError

# Called with a phase, bytes done, and bytes in all.
Watch = Callable[[str, int, int], None]

# Weights on their way at once; each needs a few slabs of memory.
NUM_WORKERS = 2


class Transfer:
    """From an opened checkpoint into a target.

    Args:
      source: what is read.
      target: what is written.
      dtype: of the values written.
      strict: whether NaN and infinity are refused, or said.
      journal: what is done already, and what is done from now on.
      watch: told of every slab.
    """

    def __init__(
        self,
        source: Checkpoint,
        target: Target,
        *,
        dtype: jnp.dtype,
        strict: bool,
        journal: Journal,
        watch: Watch,
    ) -> None:
        self._source = source
        self._target = target
        self._dtype = dtype
        self._strict = strict
        self._journal = journal
        self._weights = names.weights(source.config)
        self._progress = Progress("convert", self._weights, source, dtype, watch)
        self._stopped = threading.Event()

    def take_up(self) -> int:
        """Look that what the journal lists is there; returns how many weights are."""
        written = self._target.written()
        for weight in self._weights:
            expected = self._journal.done.get(weight.name)
            if expected is None:
                continue
            try:
                found = digest(written, weight)
            except (CheckpointError, KeyError):
                found = "not there"
            if found == expected:
                self._progress.add_weight(weight)
            else:
                self._journal.forget(weight.name)
        return len(self._journal.done)

    def run(self) -> None:
        """Write every weight that is not there yet.

        Raises:
          CheckpointError: a value overflows; or is not finite, if that is refused.
          OSError: the target cannot be written.
        """
        left = [w for w in self._weights if w.name not in self._journal.done]
        num_workers = 1 if self._target.in_order else NUM_WORKERS
        with ThreadPoolExecutor(num_workers) as pool:
            on_their_way = [pool.submit(self._move, weight) for weight in left]
            try:
                for one in on_their_way:
                    one.result()
            except BaseException:
                self._stopped.set()
                pool.shutdown(cancel_futures=True)
                raise

    def _move(self, weight: names.Weight) -> None:
        found = hashlib.sha256()
        for start, matrix in matrices(self._source, weight, self._dtype.itemsize):
            if self._stopped.is_set():
                return
            if self._strict and not all_finite(matrix):
                raise CheckpointError(
                    f"{self._source.directory}: NaN or infinity in {weight.name}, "
                    "which --strict refuses: get the weights anew, or convert without."
                )
            rounded = round_to(self._dtype, matrix, what=weight.name)
            found.update(as_bytes(rounded))
            self._target.write(weight, start, rounded)
            self._progress.add(rounded.nbytes)
        self._journal.add(weight.name, found.hexdigest())


class Progress:
    """Bytes done, told to whoever watches; from several threads."""

    def __init__(
        self,
        phase: str,
        weights: list[names.Weight],
        checkpoint: Checkpoint,
        dtype: jnp.dtype,
        watch: Watch,
    ) -> None:
        self._phase = phase
        self._itemsize = dtype.itemsize
        self._sizes = names.axis_sizes(checkpoint.config)
        self._watch = watch
        self._lock = threading.Lock()
        self._done = 0
        self._total = sum(map(self._num_bytes, weights))

    def add(self, num_bytes: int) -> None:
        """So many more."""
        with self._lock:
            self._done += num_bytes
            self._watch(self._phase, self._done, self._total)

    def add_weight(self, weight: names.Weight) -> None:
        """One whole weight more."""
        self.add(self._num_bytes(weight))

    def _num_bytes(self, weight: names.Weight) -> int:
        shape = weight.parameter.hf.shape(self._sizes)
        return int(np.prod(shape)) * self._itemsize
