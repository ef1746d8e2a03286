"""How the next token is chosen, as values; the arithmetic is in generate/sample.py.

Each sampler divides the logits by `temperature`, leaves out the tokens that it finds
too improbable, and draws from the rest. Temperature 0 is greedy. Penalties move the
logits before any sampler sees them.
"""

import dataclasses
import math
from typing import TypeGuard

from llama_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Greedy:
    """The most probable token, always."""


@dataclasses.dataclass(frozen=True)
class TopK:
    """Draw from the k most probable tokens.

    Attributes:
      k: tokens left; 1 is greedy.
      temperature: divides the logits.

    Raises:
      ConfigError: k is not a positive integer, or the temperature is negative.
    """

    k: int
    temperature: float = dataclasses.field(kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise ConfigError(
                f"top-k's k is {self.k!r}, but it counts the tokens left to choose "
                "from: give an integer of 1 or more."
            )
        _require_temperature(self.temperature)


@dataclasses.dataclass(frozen=True)
class TopP:
    """Draw from the fewest tokens that together have more than p (arXiv 1904.09751).

    Attributes:
      p: the probability; 1 leaves every token.
      temperature: divides the logits.

    Raises:
      ConfigError: p is not in (0, 1], or the temperature is negative.
    """

    p: float
    temperature: float = dataclasses.field(kw_only=True)

    def __post_init__(self) -> None:
        _require_share("top-p", self.p)
        _require_temperature(self.temperature)


@dataclasses.dataclass(frozen=True)
class MinP:
    """Draw from the tokens with at least p times the highest probability.

    From arXiv 2407.01082.

    Attributes:
      p: the share of the highest probability; 1 leaves only the best tokens.
      temperature: divides the logits.

    Raises:
      ConfigError: p is not in (0, 1], or the temperature is negative.
    """

    p: float
    temperature: float = dataclasses.field(kw_only=True)

    def __post_init__(self) -> None:
        _require_share("min-p", self.p)
        _require_temperature(self.temperature)


Sampler = Greedy | TopK | TopP | MinP


@dataclasses.dataclass(frozen=True, kw_only=True)
class Penalties:
    """What makes a token less probable that was there before.

    Attributes:
      repetition: divides a positive logit, and multiplies a negative one, of each token
        of the prompt or the answer (arXiv 1909.05858, section 4.1); 1 changes nothing.
      presence: taken from the logit of each token of the answer.
      frequency: taken from it for each time that it came in the answer.

    Raises:
      ConfigError: repetition is not above 0, or one of them is no finite number.
    """

    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0

    def __post_init__(self) -> None:
        if not (_is_number(self.repetition) and 0 < self.repetition < math.inf):
            raise ConfigError(
                f"repetition penalty is {self.repetition!r}, but it divides logits: "
                "give a number above 0; 1 changes nothing, and above 1 repeats less."
            )
        for name in ("presence", "frequency"):
            value = getattr(self, name)
            if not (_is_number(value) and math.isfinite(value)):
                raise ConfigError(
                    f"{name} penalty is {value!r}, but it is taken from logits: give a "
                    "finite number; 0 changes nothing, and above 0 repeats less."
                )


def _require_share(name: str, p: object) -> None:
    if not (_is_number(p) and 0 < p <= 1):
        raise ConfigError(
            f"{name}'s p is {p!r}, but it is a share of probability: give a number "
            "above 0 and at most 1."
        )


def _require_temperature(temperature: object) -> None:
    if not (_is_number(temperature) and 0 <= temperature < math.inf):
        raise ConfigError(
            f"temperature is {temperature!r}, but it divides the logits: give a number "
            "above 0, or 0 to always take the most probable token."
        )


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
