"""How a model is optimised, and how the run is kept."""

import dataclasses
import difflib
from collections.abc import Callable
from typing import Any, Literal, get_args

from llama_jax.errors import ConfigError

ComputeType = Literal["float32", "bfloat16"]
Attention = Literal["dot", "splash"]
ContextAttention = Literal["ring", "gathered"]
Remat = Literal[
    "none", "projections", "attention_block", "attention", "full", "offload"
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW under a cosine schedule (paper, section 2.2).

    Attributes:
      peak_lr: learning rate at the end of the warm-up.
      final_lr_fraction: of the peak, at the last step; the paper's is 0.1.
      warmup_steps: steps of linear growth from 0; the paper's are 2,000.
      warmup_fraction: of all steps, if that is more; the paper's reward models take
        0.03, and at least 5 steps.
      beta1: decay of the mean of gradients.
      beta2: decay of the mean of their squares.
      eps: added to the root of that, outside it.
      weight_decay: pulled off every matrix, times the learning rate; never off norms.
      clip_norm: the global gradient norm above which all gradients are scaled down.
      moments: what both means are kept in between steps; the arithmetic is float32.

    Raises:
      ConfigError: a value outside its range.
    """

    peak_lr: float
    final_lr_fraction: float
    warmup_steps: int
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip_norm: float
    moments: ComputeType = "float32"
    warmup_fraction: float = 0.0

    def __post_init__(self) -> None:
        for name in ("peak_lr", "eps", "clip_norm"):
            _require(self, name, lambda v: v > 0, "positive")
        for name in ("beta1", "beta2"):
            _require(self, name, lambda v: 0 <= v < 1, "at least 0 and below 1")
        for name in ("final_lr_fraction", "warmup_fraction"):
            _require(self, name, lambda v: 0 <= v <= 1, "from 0 to 1")
        for name in ("warmup_steps", "weight_decay"):
            _require(self, name, lambda v: v >= 0, "0 or more")
        types = get_args(ComputeType)
        _require(self, "moments", lambda v: v in types, f"one of {', '.join(types)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The run: its length, its batches, its arithmetic and its checkpoints.

    Attributes:
      num_steps: optimizer steps, all in all; the schedule's length. 0 only where a
        recipe counts epochs.
      batch_size: rows per step over all hosts.
      accumulate: parts of the batch that are worked off one after the other, to save
        memory; the result is that of the whole batch.
      loss_chunks: parts of the vocabulary that the loss is worked off in, to save
        memory: the logits of one part exist at a time, and the backward pass makes
        them again. Must divide the model's vocab_size; 1 keeps all logits.
      compute_dtype: what the arithmetic is done in; parameters and loss are float32
        in any case.
      remat: what the backward pass finds saved, from "full" (nothing: least memory)
        to "none" (everything); see `model.depth.run`. It may change along the depth:
        "projections:30,attention" saves projections in the first 30 layers.
      attention: the kernel: "dot" anywhere; "splash" on TPU, in tiles.
      context_attention: how attention crosses the mesh axis `context`: keys and values
        go around in a "ring", which has a kernel of its own, or are "gathered" on
        every device for that of `attention`; see `model.ring`.
      seed: of the initial parameters.
      validate_every: steps between passes over the validation split.
      checkpoint_every: steps between checkpoints.
      keep_latest: how many of the newest checkpoints stay.
      keep_period: checkpoints at multiples of this step stay for ever; 0 for none.
      on_bad_step: what happens when loss or gradient are not finite, or the gradient
        norm exceeds `spike_norm`: "stop" the run, or "skip" the update and count it.
        A bad update is never applied.
      spike_norm: gradient norm that counts as bad; None for any.
      on_damaged_checkpoint: when the newest cannot be read: "stop", or "fall_back" to
        the one before and say so.
      heartbeat_seconds: on several hosts, one that is silent for so long is lost, and
        all end.
      join_seconds: how long the hosts wait for one another when they start.

    Raises:
      ConfigError: a value outside its range, or a batch that does not split.
    """

    num_steps: int
    batch_size: int
    accumulate: int
    compute_dtype: ComputeType
    remat: str
    seed: int
    validate_every: int
    checkpoint_every: int
    keep_latest: int
    keep_period: int
    on_bad_step: Literal["stop", "skip"]
    loss_chunks: int = 1
    attention: Attention = "dot"
    context_attention: ContextAttention = "ring"
    spike_norm: float | None = None
    on_damaged_checkpoint: Literal["stop", "fall_back"] = "stop"
    heartbeat_seconds: int = 50
    join_seconds: int = 300

    def __post_init__(self) -> None:
        for name in (
            "batch_size",
            "accumulate",
            "loss_chunks",
            "validate_every",
            "checkpoint_every",
            "keep_latest",
            "heartbeat_seconds",
            "join_seconds",
        ):
            _require(self, name, lambda v: v > 0, "positive")
        _require(self, "spike_norm", lambda v: v is None or v > 0, "positive, or None")
        for name in ("num_steps", "seed", "keep_period"):
            _require(self, name, lambda v: v >= 0, "0 or more")
        for name, choices in (
            ("compute_dtype", get_args(ComputeType)),
            ("attention", get_args(Attention)),
            ("context_attention", get_args(ContextAttention)),
            ("on_bad_step", ("stop", "skip")),
            ("on_damaged_checkpoint", ("stop", "fall_back")),
        ):
            _require(
                self, name, lambda v, c=choices: v in c, f"one of {', '.join(choices)}"
            )
        remat_pieces(self.remat)
        if self.batch_size % self.accumulate:
            parts = [n for n in range(1, 65) if self.batch_size % n == 0]
            raise ConfigError(
                f"batch_size {self.batch_size} does not split into accumulate "
                f"{self.accumulate} parts: choose accumulate from {parts}."
            )


def remat_pieces(remat: str) -> list[tuple[Remat, int | None]]:
    """The policies of `remat` in the order of the depth, with their layers.

    The last has None, all layers that are left.

    Raises:
      ConfigError: no such policy, or a number of layers that is none.
    """
    *first, last = (piece.partition(":") for piece in remat.split(","))
    pieces: list[tuple[Remat, int | None]] = []
    for name, _, count in first:
        if not count.isdecimal() or int(count) == 0:
            raise ConfigError(
                f"remat {remat!r} does not say for how many layers {name!r} holds: "
                'write it as "projections:30,attention", the last without a number.'
            )
        pieces.append((_policy(name), int(count)))
    if last[1]:
        raise ConfigError(
            f"remat {remat!r} ends with a number: the last policy holds for all "
            f"layers that are left, so write {last[0]!r} alone."
        )
    return [*pieces, (_policy(last[0]), None)]


def _policy(name: str) -> Remat:
    for policy in get_args(Remat):
        if name == policy:
            return policy
    near = difflib.get_close_matches(name, get_args(Remat), n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(
        f"remat {name!r} is unknown.{hint} It is one of {', '.join(get_args(Remat))}."
    )


def _require(
    config: object, name: str, holds: Callable[[Any], bool], constraint: str
) -> None:
    value = getattr(config, name)
    if not holds(value):
        raise ConfigError(
            f"{type(config).__name__}.{name} is {value!r}: it must be {constraint}."
        )
