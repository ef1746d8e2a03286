"""The two layouts of rotary features, and the way between them.

Meta's files hold the pair that turns together as neighbours: features (2i, 2i + 1).
The model here, and Hugging Face's, keeps pairs half a head apart, (i, i + H / 2),
which on a TPU turns with two slices instead of a shuffle. Scores are sums over
features, so a permutation that queries and keys share changes no result: it is applied
once, to their weights.
"""

import numpy as np


def half_split_order(head_dim: int) -> np.ndarray:
    """The interleaved feature that each half-split one is: 0, 2, ..., 1, 3, ..."""
    return np.arange(head_dim).reshape(head_dim // 2, 2).T.reshape(head_dim)


def interleaved_order(head_dim: int) -> np.ndarray:
    """The half-split feature that each interleaved one is: 0, H/2, 1, H/2 + 1, ..."""
    return np.arange(head_dim).reshape(2, head_dim // 2).T.reshape(head_dim)
