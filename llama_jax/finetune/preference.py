"""What comparisons teach (section 3.2.2): losses of scores, in nats.

Scores are raw, before the sigmoid; functions are of each element.
"""

from collections.abc import Mapping

import jax
import numpy as np
from jaxtyping import Array, Bool, Float

from llama_jax.config.finetune import Margin

# How far apart scores are to be (Table 27), by a place in `data.prepared.RATINGS`: the
# four ratings from the strongest, and none given, which asks for nothing (ours).
MARGINS: Mapping[Margin, Float[np.ndarray, "5"]] = {
    "none": np.zeros(5, np.float32),
    "small": np.array([1, 2 / 3, 1 / 3, 0, 0], np.float32),
    "large": np.array([3, 2, 1, 0, 0], np.float32),
}


def ranking_loss(
    chosen: Float[Array, "*_"], rejected: Float[Array, "*_"], margin: Float[Array, "*_"]
) -> Float[Array, "*_"]:
    """-log σ(chosen - rejected - margin): equations 1 and 2."""
    return -jax.nn.log_sigmoid(chosen - rejected - margin)


def safety_loss(
    score: Float[Array, "*_"], is_safe: Bool[Array, "*_"]
) -> Float[Array, "*_"]:
    """-log σ(score) of a safe answer, -log σ(-score) of one that is not.

    The paper names an auxiliary safety loss (appendix A.3.4) and prints no formula:
    this cross-entropy is our reading. At σ(score) = 1/2 it parts the two.
    """
    return -jax.nn.log_sigmoid(jax.numpy.where(is_safe, score, -score))
