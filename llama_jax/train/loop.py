"""The loop: the only place where anything changes."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from llama_jax.checkpoint.manager import RunCheckpoints
from llama_jax.config.recipe import TrainingRecipe
from llama_jax.data.batch import AnyBatch
from llama_jax.train import faults
from llama_jax.train.metrics import Sink, Stopwatch
from llama_jax.train.objective import Objective
from llama_jax.train.state import TrainState, to_items
from llama_jax.train.step import EvalStep, TrainStep
from sharding import hosts


@dataclasses.dataclass(frozen=True)
class Run:
    """All that the loop uses.

    Attributes:
      recipe: the resolved recipe.
      mesh: the devices.
      train_step: compiled; consumes the state.
      eval_step: compiled; what the objective measures of a batch.
      objective: what is made small.
      validation: makes an iterator over the whole validation split.
      checkpoints: where the state goes.
      sink: where the measurements go.
      guard: says when to validate, save and stop.
      profile: steps to trace, as (first, last), into `profile_dir`; None for none.
      profile_dir: for `jax.profiler`.
    """

    recipe: TrainingRecipe
    mesh: jax.sharding.Mesh
    train_step: TrainStep
    eval_step: EvalStep
    objective: Objective
    validation: Callable[[], Iterable[AnyBatch]]
    checkpoints: RunCheckpoints
    sink: Sink
    guard: faults.Guard
    profile: tuple[int, int] | None
    profile_dir: str


def train(run: Run, state: TrainState, data: Iterable[AnyBatch], position: int) -> bool:
    """Step until the recipe's last step, or until asked to stop.

    Args:
      run: the parts.
      state: where to begin; consumed.
      data: global batches, from the first one not yet consumed.
      position: rows consumed before.

    Returns:
      Whether the run has reached its end, and was validated there.
    """
    settings = run.recipe.train
    clock = Stopwatch()
    first = step = int(state.step)
    is_validated = True

    def validated() -> bool:
        with clock.measure("validate"):
            report = validate(run, state)
        if report is not None:
            run.sink.write(step, **report)
        return report is not None

    with (
        jax.set_mesh(run.mesh),
        profiler(run.profile, run.profile_dir) as profile,
    ):
        if step == settings.num_steps:
            is_due = hosts.any_host(run.sink.lacks(step, "validation_loss"))
            is_validated = not is_due or validated()  # a signal came before it could be
        remaining = range(first + 1, settings.num_steps + 1)
        for step, batch in zip(remaining, clock.waiting(data), strict=False):
            profile(step)
            with clock.compiling(step == first + 1):
                state, measured = run.train_step(state, batch)
            position += settings.batch_size
            run.sink.record(step, measured)
            decision = run.guard.decide(step, measured)
            if decision.validate or decision.save:
                run.sink.flush()  # a bad step is found before it is saved
            if decision.validate:
                is_validated = validated()
            if decision.save:
                with clock.measure("save"):
                    run.checkpoints.save(step, to_items(state), position, run.recipe)
            if decision.stop:
                break
        run.sink.flush()
        run.sink.write(step, time_shares=clock.shares())
    return step >= settings.num_steps and is_validated


def validate(run: Run, state: TrainState) -> dict[str, Any] | None:
    """What the objective reports of the whole validation split; None if stopped."""
    sums: dict[str, np.ndarray] = {}
    for batch in run.validation():
        if run.guard.stop_now():  # saving must not wait for a whole split
            return None
        for name, part in run.eval_step(state.params, batch).items():
            sums[name] = sums.get(name, 0.0) + np.asarray(part, np.float64)
    return run.objective.report(sums)


@contextlib.contextmanager
def profiler(
    steps: tuple[int, int] | None, directory: str
) -> Iterator[Callable[[int], None]]:
    """A function to call before each step, which traces those that were asked for."""
    first, last = steps or (-1, -1)
    tracing = False

    def before(step: int) -> None:
        nonlocal tracing
        if step == first:
            jax.profiler.start_trace(directory)
            tracing = True
        elif step == last + 1 and tracing:
            jax.profiler.stop_trace()
            tracing = False

    try:
        yield before
    finally:
        if tracing:
            jax.profiler.stop_trace()
