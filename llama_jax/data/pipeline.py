"""Prepared rows to batches: shuffled and endless to train, in order to validate.

The place of a run in its data is one integer, the rows consumed, whatever the number
of hosts: batch k holds rows k B to (k + 1) B of one global order, of which each host
reads its part.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from llama_jax.config.data import DataConfig
from llama_jax.data.batch import AnyBatch, batches_of
from llama_jax.data.mixture import mix
from llama_jax.data.prepare import TRAIN
from llama_jax.data.prepared import Prepared
from llama_jax.errors import DataError

# Batches read ahead by threads. Rows are tokenised already, so that reading them is
# little work: this hides the latency of a disk, and holds little memory.
_READ_AHEAD = grain.ReadOptions(num_threads=4, prefetch_buffer_size=16)


def open_data(config: DataConfig) -> list[Prepared]:
    """What lies at each of the paths of a configuration.

    Raises:
      DataError: it is no prepared data, or does not fit the configuration or one
        another.
    """
    sets = [Prepared.load(path) for path in config.paths]
    for prepared in sets:
        if prepared.row_length != config.sequence_length:
            raise DataError(
                f"{prepared.path} has rows of {prepared.row_length} tokens, and "
                f"sequence_length is {config.sequence_length}: set it to "
                f"{prepared.row_length}, or prepare the data again."
            )
        prepared.require_tokenizer(sets[0].tokenizer)
        if prepared.kind != sets[0].kind:
            raise DataError(
                f"{prepared.path} holds {prepared.kind} and {sets[0].path} "
                f"{sets[0].kind}: a run reads one or the other."
            )
    return sets


class TrainingData(Iterator[AnyBatch]):
    """An endless iterator over the rows of this host, which can be put anywhere.

    The same seed gives the same rows on every machine; each epoch has its own order.

    Args:
      config: what is read.
      batch_size: rows of a batch over all hosts, B.
      host: which of the hosts this is.
      num_hosts: how many share a batch; each reads rows that follow one another.
      position: rows that all hosts together have consumed before.

    Raises:
      DataError: the data are missing, damaged or do not fit; see `open_data`.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        batch_size: int,
        host: int = 0,
        num_hosts: int = 1,
        position: int = 0,
    ) -> None:
        sets = open_data(config)
        self._batch_size = batch_size
        self._rows = mix(
            [prepared.rows(TRAIN) for prepared in sets],
            weights=config.weights,
            seed=config.seed,
        )
        self._host_batches = functools.partial(
            _host_batches,
            to_batch=_to_batch(config, sets[0]),
            host_rows=_rows_per_host(batch_size, num_hosts),
            host=host,
            num_hosts=num_hosts,
        )
        self.position = position

    @property
    def position(self) -> int:
        """Rows consumed by all hosts; what was read ahead does not count."""
        return self._position

    @position.setter
    def position(self, position: int) -> None:
        if position < 0:
            raise DataError(f"position is {position}: it counts rows, from 0.")
        self._position = position
        self._batches = self._host_batches(self._rows[position:])

    def __iter__(self) -> Iterator[AnyBatch]:
        return self

    def __next__(self) -> AnyBatch:
        batch = next(self._batches)
        self._position += self._batch_size
        return batch


class ValidationData:
    """One pass over every held-out row, as often as it is iterated.

    The last batch is filled up with rows that weigh nothing, so that all batches have
    one shape and every host has equally many.

    Args:
      config: what is read.
      batch_size: rows of a batch over all hosts, B.
      host: which of the hosts this is.
      num_hosts: how many share a batch; each reads rows that follow one another.

    Attributes:
      num_targets: tokens that are predicted, or comparisons: the sum of all weights.
      text_bytes: UTF-8 of the documents: nats / (bytes ln 2) are bits per byte.

    Raises:
      DataError: the data are missing, damaged or do not fit; see `open_data`.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        batch_size: int,
        host: int = 0,
        num_hosts: int = 1,
    ) -> None:
        sets = open_data(config)
        rows = [prepared.rows(config.validation_split) for prepared in sets]
        num_rows = sum(map(len, rows))
        sources = list(map(grain.MapDataset.source, rows))
        host_rows = _rows_per_host(batch_size, num_hosts)
        if lacking := -num_rows % batch_size:
            padding = [np.empty(0, np.int32)] * lacking
            sources.append(grain.MapDataset.source(padding))
        self._num_batches = -(-num_rows // batch_size)
        self._host_batches = functools.partial(
            _host_batches,
            grain.MapDataset.concatenate(sources),
            to_batch=_to_batch(config, sets[0]),
            host_rows=host_rows,
            host=host,
            num_hosts=num_hosts,
        )
        splits = [prepared.splits[config.validation_split] for prepared in sets]
        self.num_targets = sum(split.num_targets for split in splits)
        self.text_bytes = sum(split.text_bytes for split in splits)

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[AnyBatch]:
        return self._host_batches()


def _to_batch(
    config: DataConfig, prepared: Prepared
) -> Callable[[Sequence[np.ndarray]], AnyBatch]:
    return batches_of(
        prepared.kind,
        length=config.sequence_length,
        bos_id=prepared.bos_id if config.segments else None,
    )


def _host_batches(
    rows: grain.MapDataset[np.ndarray],
    *,
    to_batch: Callable[[Sequence[np.ndarray]], AnyBatch],
    host_rows: int,
    host: int,
    num_hosts: int,
) -> Iterator[AnyBatch]:
    """A host's part of each batch: every `num_hosts`-th of the groups of its size."""
    # All groups are full; an endless stream has no length that could be rounded up.
    groups = rows.batch(host_rows, drop_remainder=True, batch_fn=to_batch)
    groups = groups[host::num_hosts]
    return iter(groups.to_iter_dataset(_READ_AHEAD))


def _rows_per_host(batch_size: int, num_hosts: int) -> int:
    if batch_size < 1 or batch_size % num_hosts:
        raise DataError(
            f"a batch of {batch_size} rows does not split over {num_hosts} hosts: "
            f"choose a positive multiple of {num_hosts}."
        )
    return batch_size // num_hosts
