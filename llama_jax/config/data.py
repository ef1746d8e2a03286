"""What a run reads: prepared data sets, in which proportions and order."""

import dataclasses
import math
from typing import Literal

from llama_jax.errors import ConfigError

# How much better one of two answers is (section 3.2.1), as the paper words it.
Rating = Literal[
    "significantly better", "better", "slightly better", "negligibly better"
]
# The paper's categories of risk (section 4.2.1).
Risk = Literal[
    "illicit and criminal activities",
    "hateful and harmful activities",
    "unqualified advice",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data of a run. The size of a batch is the trainer's affair.

    Attributes:
      paths: directories that `data.prepare` wrote.
      weights: one for each path: the proportions in which training draws rows from
        them, of any scale. The paper up-samples its most factual sources (section
        2.1) but prints no proportions.
      sequence_length: tokens of a row that the model reads at once, T; the data are
        prepared for it.
      seed: of the order of the training rows.
      segments: keep the documents of a row from seeing each other. The paper does not
        say; the usual reading is that they do.
      validation_split: the split of each data set that is held out from training.

    Raises:
      ConfigError: no path, a path twice, other weights than paths, or a value outside
        its range.
    """

    paths: tuple[str, ...]
    weights: tuple[float, ...] = (1.0,)
    sequence_length: int
    seed: int
    segments: bool = False
    validation_split: str = "validation"

    def __post_init__(self) -> None:
        if not self.paths or not all(self.paths):
            raise ConfigError(
                f"paths is {self.paths!r}: name one or more directories of "
                "prepared data."
            )
        if len(set(self.paths)) < len(self.paths):
            raise ConfigError(
                f"paths names a directory twice, {self.paths!r}: name it once, with a "
                "larger weight."
            )
        if len(self.weights) != len(self.paths):
            raise ConfigError(
                f"weights has {len(self.weights)} numbers for {len(self.paths)} paths: "
                "give one for each, for instance "
                f"{tuple(1.0 for _ in self.paths)}."
            )
        for weight in self.weights:
            if not (math.isfinite(weight) and weight > 0):
                raise ConfigError(
                    f"weights holds {weight!r}: a weight is a positive number; leave "
                    "out the path of a data set that is not to be read."
                )
        if self.sequence_length < 1:
            raise ConfigError(
                f"sequence_length is {self.sequence_length}: it has to be positive."
            )
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed is {self.seed}: choose one from 0 to {2**32 - 1}.")
        if self.validation_split in ("", "train"):
            raise ConfigError(
                f"validation_split is {self.validation_split!r}: name a split that is "
                "not trained on, such as 'validation'."
            )
