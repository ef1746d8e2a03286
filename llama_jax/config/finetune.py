"""What the stages of fine-tuning have beside what every training has."""

import dataclasses
import math
from typing import Literal, get_args

from llama_jax.errors import ConfigError

Margin = Literal["none", "small", "large"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """The loss of a reward model (section 3.2.2).

    Attributes:
      margin: how far apart the scores of two answers are to be, by how much better
        the one was rated (Table 27): "none", "small" or "large". The paper does not
        say which its final models had; it prints a gain for both.
      safety_weight: of the auxiliary loss, by which a score tells whether an answer is
        safe. The paper says what it is for and what it gains (Table 29), but neither
        form nor weight; 0 leaves it out.

    Raises:
      ConfigError: a value outside its range.
    """

    margin: Margin
    safety_weight: float

    def __post_init__(self) -> None:
        if self.margin not in get_args(Margin):
            raise ConfigError(
                f"reward.margin is {self.margin!r}: choose one of "
                f"{', '.join(get_args(Margin))}."
            )
        if not (math.isfinite(self.safety_weight) and self.safety_weight >= 0):
            raise ConfigError(
                f"reward.safety_weight is {self.safety_weight!r}: it must be 0 or more."
            )
