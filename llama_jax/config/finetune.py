"""What the stages of fine-tuning have beside what every training has."""

import dataclasses
import math
from typing import Literal, get_args

from llama_jax.errors import ConfigError

Margin = Literal["none", "small", "large"]
Judged = Literal["helpfulness", "safety"]


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class PpoConfig:
    """How a policy answers, and what it learns of that (section 3.2.3).

    The paper gives the reward, the ratio's clip, the size of an iteration and beta. It
    is silent on the critic, the advantages, sampling and length: these are ours.

    Attributes:
      helpfulness: the reward model of that name, the work directory of its run.
      safety: likewise.
      critic: the reward model whose parameters the critic begins with (ours).
      threshold: probability of being safe below which only that counts; the paper's is
        0.15.
      beta: weight of the divergence from the model that the policy began as; the
        paper's is 0.01 for 7B and 13B, 0.005 for 34B and 70B. It is summed over the
        tokens of an answer (ours).
      prompts: of an iteration, over all hosts; the paper's are 512. Scores are whitened
        over all of them (ours), and `train.batch_size` of them make a step.
      max_new_tokens: of an answer, EOS included (ours).
      temperature: of sampling (ours). Beside 1, the measured divergence is not that of
        what was sampled.
      clip: how far the ratio of new to old probability may be from 1; the paper's is
        0.2.
      value_clip: how far a value may go from the old one in an iteration (ours).
      gamma: discount of rewards per token (ours).
      lam: of generalised advantages: how far to trust rewards rather than the critic's
        values; 1 trusts rewards alone (ours).
      critic_lr: the critic's learning rate; None for the policy's, `optimizer.peak_lr`.
      patience: the run ends once so many passes over held-out prompts, one after the
        other, have not beaten the best; None for never. The paper stops early by
        held-out prompts, and does not say by which rule (ours).
      max_kl: how far answers to held-out prompts may be from the model that the policy
        began as, in nats an answer; None for any distance. A pass that is farther is
        never the best, and one of those that have not beaten it: far away reward
        models praise what people would not, on held-out prompts as well (ours).
      decode_tensor: devices that share a copy of the weights while answers are written.
      decode_batch: prompts that are answered at a time, as memory allows.

    Raises:
      ConfigError: a value outside its range.
    """

    helpfulness: str
    safety: str
    critic: Judged
    threshold: float
    beta: float
    prompts: int
    max_new_tokens: int
    temperature: float
    clip: float
    value_clip: float
    gamma: float
    lam: float
    patience: int | None
    decode_tensor: int
    decode_batch: int
    critic_lr: float | None = None
    max_kl: float | None = None

    def __post_init__(self) -> None:
        def require(name: str, holds: bool, constraint: str) -> None:
            if not holds:
                raise ConfigError(
                    f"ppo.{name} is {getattr(self, name)!r}: it must be {constraint}."
                )

        for name in ("helpfulness", "safety"):
            named = bool(getattr(self, name))
            require(name, named, "the work directory of a reward model's run")
        judged = get_args(Judged)
        require("critic", self.critic in judged, f"one of {', '.join(judged)}")
        for name in ("threshold", "clip"):
            require(name, 0 < getattr(self, name) < 1, "above 0 and below 1")
        for name in ("gamma", "lam"):
            require(name, 0 <= getattr(self, name) <= 1, "from 0 to 1")
        require("beta", 0 <= self.beta < math.inf, "0 or more")
        for name in ("temperature", "value_clip"):
            require(name, 0 < getattr(self, name) < math.inf, "positive")
        for name in ("prompts", "max_new_tokens", "decode_tensor", "decode_batch"):
            require(name, getattr(self, name) > 0, "positive")
        for name in ("critic_lr", "patience", "max_kl"):
            value = getattr(self, name)
            require(name, value is None or value > 0, "positive, or None")
        if self.max_kl is not None and self.patience is None:
            raise ConfigError(
                f"ppo.max_kl is {self.max_kl!r}, and no pass ends a run whose "
                "ppo.patience is None: set both, or neither."
            )
