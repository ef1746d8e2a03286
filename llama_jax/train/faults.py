"""When to save and when to stop: preemption, lost hosts, bad numbers, full memory."""

import contextlib
import dataclasses
import logging
import os
import signal
import socket
import threading
import traceback
from collections.abc import Iterator
from typing import Any

import jax

from llama_jax.config.train import TrainConfig
from llama_jax.errors import LlamaError, TrainingError
from sharding import ShardingError, hosts

_log = logging.getLogger(__name__)

# sysexits.h EX_TEMPFAIL: saved and stopped on request; start the same command again.
EXIT_PREEMPTED = 75
# Another host was lost, or never came: start the same command again on every host. What
# was saved before is whole, but nothing was saved for this.
EXIT_HOST_LOST = 76

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
    """Turns signals and the calendar of a run into decisions.

    Attributes:
      settings: of the run.
      stop_requested: whether a signal has come to this host.
    """

    settings: TrainConfig
    stop_requested: bool = False
    _asked: jax.Array | bool = False

    def decide(self, step: int, measured: Any) -> Decision:
        """After `step` steps are done: validate, save, stop, or none of these.

        Args:
          step: how many steps.
          measured: what the last of them computes, perhaps still.
        """
        stop = self._stop(measured)
        last = step == self.settings.num_steps
        return Decision(
            validate=last or (not stop and step % self.settings.validate_every == 0),
            save=stop or last or step % self.settings.checkpoint_every == 0,
            stop=stop,
        )

    def stop_now(self) -> bool:
        """Whether a signal has come to any host: waits for the devices."""
        self._asked = hosts.any_host(self.stop_requested)
        return bool(self._asked)

    def _stop(self, measured: Any) -> bool:
        if jax.process_count() == 1:
            return self.stop_requested
        # The answer is read one step late, as the measurements are, so that no host
        # waits for the step that has just begun.
        before = self._asked
        self._asked = hosts.any_host(self.stop_requested, after=measured)
        return bool(before)

    def _listen(self, signals: socket.socket) -> None:
        """Take the numbers of signals as they come, until there is an end of them."""
        for number in iter(lambda: signals.recv(1), b""):
            if self.stop_requested:
                os._exit(128 + number[0])
            self.stop_requested = True
            _log.warning(
                "%s: saving after this step, then stopping; once more stops at once.",
                signal.Signals(number[0]).name,
            )


@contextlib.contextmanager
def guard(settings: TrainConfig) -> Iterator[Guard]:
    """Watch for SIGTERM and Ctrl-C; a second one ends the process at once.

    A thread of its own watches. A handler in Python runs only between two operations
    of the main thread, which may be in the compiler for minutes.
    """
    watching = Guard(settings)
    heard, told = socket.socketpair()
    told.setblocking(False)
    listener = threading.Thread(target=watching._listen, args=(heard,), daemon=True)
    listener.start()
    woken_before = signal.set_wakeup_fd(told.fileno())
    before: dict[signal.Signals, Any] = {
        number: signal.signal(number, lambda number, frame: None) for number in _SIGNALS
    }
    try:
        yield watching
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(woken_before)
        told.close()
        listener.join()
        heard.close()


@contextlib.contextmanager
def shared_fate() -> Iterator[None]:
    """On several hosts, end the process where alone an error would travel up.

    The others wait for this host, so its end has to be theirs; see `hosts.leave`.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        if not isinstance(error, LlamaError | ShardingError):
            traceback.print_exc()
        hosts.leave(str(error) or type(error).__name__, status=1)


@contextlib.contextmanager
def host_loss() -> Iterator[None]:
    """End the process at once if a computation fails because another host was lost.

    Inside of whatever would wait for the lost one on the way out.
    """
    try:
        yield
    except Exception as error:
        for reason in (error, error.__cause__):
            if jax.process_count() > 1 and reason and hosts.is_loss(reason):
                hosts.leave(
                    f"another host was lost ({str(reason).splitlines()[0]}). Whole "
                    "checkpoints stay: start every host again.",
                    status=EXIT_HOST_LOST,
                )
        raise


@contextlib.contextmanager
def together(**waiting: int) -> Iterator[None]:
    """Within this all hosts run together, and end together.

    Args:
      waiting: how long for one another, as `hosts.start` has it.
    """
    hosts.start(lost_status=EXIT_HOST_LOST, **waiting)
    hosts.cache_compilations()
    with shared_fate(), host_loss():
        yield


def memory_advice(settings: TrainConfig) -> contextlib.AbstractContextManager[None]:
    """`out_of_memory` of a training step."""
    return out_of_memory(
        "the training step",
        f"cheapest first: --train.remat full (it is {settings.remat}); more "
        f"--train.accumulate (now {settings.accumulate}) or --train.loss-chunks "
        f"(now {settings.loss_chunks}); --optimizer.moments bfloat16; a smaller "
        f"--train.batch-size (now {settings.batch_size}); more shards, by "
        "--mesh.fsdp or --mesh.tensor",
    )


@contextlib.contextmanager
def out_of_memory(what: str, remedies: str) -> Iterator[None]:
    """Turn the compiler's or the device's "out of memory" into one with remedies.

    Args:
      what: does not fit.
      remedies: what to change, and how it is.

    Raises:
      TrainingError: it does not fit.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not any(
            sign in str(error) for sign in _OUT_OF_MEMORY
        ):
            raise
        reason = str(error).splitlines()[0] if str(error) else "MemoryError"
        raise TrainingError(
            f"{what} does not fit into memory ({reason}). Remedies, {remedies}."
        ) from error
