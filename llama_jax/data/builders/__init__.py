"""Corpora as tensorflow-datasets builders, without TensorFlow."""

from typing import Any

import tensorflow_datasets as tfds

from llama_jax.data.builders.shakespeare import Shakespeare
from llama_jax.data.sources import Documents, Records
from llama_jax.errors import DataError

__all__ = ["Shakespeare", "tfds_splits"]


def tfds_splits(name: str, directory: str) -> dict[str, list[Documents]]:
    """The documents of a TFDS data set, made first if it is not there yet.

    Each of its shards is a source, and so becomes one file of rows.

    Args:
      name: as "shakespeare" or "c4/en"; its records need a field "text".
      directory: where TFDS keeps its data sets.

    Raises:
      DataError: there is no such data set, it cannot be downloaded or written, or its
        package is not installed.
    """
    try:
        builder = tfds.builder(
            name, data_dir=directory, file_format="array_record", try_gcs=False
        )
    except (tfds.core.registered.DatasetNotFoundError, ValueError):
        raise DataError(
            f"there is no data set {name!r}: give one that tensorflow-datasets lists, "
            "or 'shakespeare'."
        ) from None
    try:
        builder.download_and_prepare()
    except OSError as error:  # those of the network are of this kind too
        raise DataError(
            f"the data set {name!r} cannot be had: {error}. Check the connection, and "
            f"that {directory} can be written."
        ) from error
    splits: dict[str, list[Documents]] = {}
    for split, info in builder.info.splits.items():
        splits[split] = []
        for i in range(info.num_shards):
            records: Any = builder.as_data_source(split=f"{split}[{i}shard]")
            place = f"{builder.info.full_name} {split} {i}"
            splits[split].append(Records(place, records))
    return splits
