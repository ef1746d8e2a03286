"""Several data sets as one."""

from collections.abc import Sequence

import grain
import numpy as np

from llama_jax.data.prepared import Rows


def mix(
    sources: Sequence[Rows], *, weights: Sequence[float], seed: int
) -> grain.MapDataset[np.ndarray]:
    """An endless stream of rows, drawn from each source in proportion to its weight.

    Each source is shuffled and begun again on its own, in another order each time:
    the smaller it is for its weight, the more often it is read. Any row of the stream
    can be had directly, and the same arguments give the same stream.
    """
    streams = [
        grain.MapDataset.source(rows).shuffle(seed=(seed + i) % 2**32).repeat()
        for i, rows in enumerate(sources)
    ]
    return grain.MapDataset.mix(streams, weights)
