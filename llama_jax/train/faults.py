"""When to save and when to stop: preemption, and numbers that are not numbers."""

import contextlib
import dataclasses
import logging
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from llama_jax.config.train import TrainConfig
from llama_jax.errors import TrainingError

_log = logging.getLogger(__name__)

# sysexits.h EX_TEMPFAIL: saved and stopped on request; start the same command again.
EXIT_PREEMPTED = 75

_SIGNALS = (signal.SIGTERM, signal.SIGINT)

_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory")


@dataclasses.dataclass(frozen=True)
class Decision:
    """What to do after a step; the same on every host."""

    validate: bool
    save: bool
    stop: bool


@dataclasses.dataclass
class Guard:
    """Turns signals and the calendar of a run into decisions."""

    settings: TrainConfig
    stop_requested: bool = False

    def decide(self, step: int) -> Decision:
        """After `step` steps are done: validate, save, stop, or none of these."""
        stop = self._preempted(step)
        last = step == self.settings.num_steps
        return Decision(
            validate=last or (not stop and step % self.settings.validate_every == 0),
            save=stop or last or step % self.settings.checkpoint_every == 0,
            stop=stop,
        )

    def _preempted(self, step: int) -> bool:
        if jax.process_count() == 1:
            return self.stop_requested
        # JAX's coordination service saw the signal, on whichever host, and names one
        # step that all hosts have yet to reach.
        return multihost_utils.reached_preemption_sync_point(step)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.stop_requested = True
        _log.warning(
            "%s: saving after this step, then stopping; once more stops at once.",
            signal.Signals(number).name,
        )
        for stopping in _SIGNALS:
            signal.signal(stopping, signal.SIG_DFL)


@contextlib.contextmanager
def guard(settings: TrainConfig) -> Iterator[Guard]:
    """Watch for SIGTERM and Ctrl-C; a second one ends the process at once."""
    watching = Guard(settings)
    before: dict[signal.Signals, Any] = {}
    if jax.process_count() == 1:
        before = {s: signal.signal(s, watching._on_signal) for s in _SIGNALS}
    try:
        yield watching
    finally:
        for stopping, handler in before.items():
            signal.signal(stopping, handler)


@contextlib.contextmanager
def memory_advice(settings: TrainConfig) -> Iterator[None]:
    """Turn the compiler's or the device's "out of memory" into one with remedies."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not any(
            sign in str(error) for sign in _OUT_OF_MEMORY
        ):
            raise
        reason = str(error).splitlines()[0] if str(error) else "MemoryError"
        raise TrainingError(
            f"the training step does not fit into memory ({reason}). Remedies, "
            f"cheapest first: --train.remat full (it is {settings.remat}); more "
            f"--train.accumulate (now {settings.accumulate}); a smaller "
            f"--train.batch-size (now {settings.batch_size}); more shards, by "
            "--mesh.fsdp or --mesh.tensor."
        ) from error
