"""Checkpoints of a run: state, position in the data, and the recipe, in one step.

    WORKDIR/tokenizer.model
    WORKDIR/checkpoints/STEP/params      parameters, readable alone
    WORKDIR/checkpoints/STEP/optimizer   counts and the optimizer's moments
    WORKDIR/checkpoints/STEP/data        rows consumed, as JSON
    WORKDIR/checkpoints/STEP/recipe      the resolved recipe, as JSON

Orbax writes a step in the background and makes it visible only when it is whole.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as ocm

from llama_jax.checkpoint.params import (
    TOKENIZER,
    ParamsCheckpoint,
    absolute,
    first_line,
    in_chunks,
    open_orbax,
    uncompressed,
)
from llama_jax.config import LlamaConfig
from llama_jax.config.recipe import (
    PretrainRecipe,
    TrainingRecipe,
    differences,
    to_json,
)
from llama_jax.errors import CheckpointError
from sharding import hosts

_log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"

# Fields that a resumed run may not change: the saved arrays would mean something else.
_FIXED = ("model.", "stage")
# A tree of arrays split in two, so that parameters can be read without the rest.
State = Mapping[str, Any]


class RunCheckpoints:
    """The checkpoints of one run; a context that waits for writing to end.

    Args:
      workdir: the run's directory; local or a bucket.
      keep_latest: how many of the newest steps stay.
      keep_period: steps at multiples of this stay for ever; 0 for none.
    """

    def __init__(
        self, workdir: epath.PathLike, *, keep_latest: int, keep_period: int
    ) -> None:
        self._directory = absolute(epath.Path(workdir)) / CHECKPOINTS
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        for item in ("params", "optimizer"):
            registry.add(item, ocp.args.PyTreeSave, uncompressed())
        self._best = _Best()
        policies: list[ocm.PreservationPolicy] = [ocm.LatestN(keep_latest), self._best]
        if keep_period:
            policies.append(ocm.EveryNSteps(keep_period))
        try:
            self._manager = ocp.CheckpointManager(
                self._directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=ocm.AnyPreservationPolicy(policies),
                    enable_async_checkpointing=True,
                ),
                handler_registry=registry,
            )
        except OSError as error:
            raise CheckpointError(
                f"{self._directory} cannot be made: {error}. Give another --workdir."
            ) from error

    def __enter__(self) -> Self:
        """The same."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait until what was saved is on disk.

        Raises:
          CheckpointError: it could not be written.
        """
        try:
            self._manager.close()
        except (OSError, ValueError, RuntimeError) as failure:
            if kind is None:
                raise CheckpointError(
                    f"the last checkpoint could not be written to {self._directory}: "
                    f"{first_line(failure)}. The steps before it are whole."
                ) from failure

    @property
    def steps(self) -> list[int]:
        """Steps that are whole, oldest first."""
        return sorted(self._manager.all_steps())

    def keep_best(self, step: int) -> None:
        """This step stays until there is a better one, however old it gets."""
        self._best.step = step

    def save(
        self, step: int, state: State, position: int, recipe: TrainingRecipe
    ) -> None:
        """Start writing; returns when the arrays are off the devices.

        Args:
          step: steps done.
          state: {"params": ..., "optimizer": ...}.
          position: rows consumed by these steps.
          recipe: the resolved recipe.
        """
        try:
            if step in self._manager.all_steps():
                self._manager.delete(step)  # damaged: the run fell back behind it
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=in_chunks(state["params"]),
                    optimizer=ocp.args.PyTreeSave(state["optimizer"]),
                    data=ocp.args.JsonSave({"position": position}),
                    recipe=ocp.args.JsonSave(to_json(recipe)),
                ),
                force=True,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"step {step} cannot be written to {self._directory}: {error}. The "
                "steps before it are whole."
            ) from error

    def restore(
        self, target: State, recipe: TrainingRecipe, *, on_damaged: str
    ) -> tuple[State, int] | None:
        """The newest state, in the layout of `target`; None if there is none.

        Args:
          target: shapes, types and shardings of {"params": ..., "optimizer": ...}.
          recipe: what is about to run; a change of architecture is refused, any other
            is logged.
          on_damaged: "stop", or "fall_back" to the step before a damaged one.

        Returns:
          The state, and the rows of data that it has consumed.

        Raises:
          CheckpointError: damaged, or of another architecture.
        """
        for step in reversed(self.steps):
            read: tuple[State, int] | _Damaged
            try:
                self._require_same_model(step, recipe)
                read = self._read(step, target)
            except _Damaged as damage:
                read = damage
            damaged = bool(hosts.any_host(isinstance(read, _Damaged)))
            if not (damaged or isinstance(read, _Damaged)):
                return read
            seen = read if isinstance(read, _Damaged) else "another host says so"
            advice = (
                f"step {step} in {self._directory} is damaged: {seen}. Steps there: "
                f"{self.steps}."
            )
            if on_damaged == "stop":
                raise CheckpointError(
                    f"{advice} To go on from the one before, give "
                    "--train.on-damaged-checkpoint fall_back, or remove that step."
                )
            _log.warning("%s Falling back to the one before.", advice)
        if self.steps:
            raise CheckpointError(
                f"none of the steps {self.steps} in {self._directory} can be read."
            )
        return None

    def _read(self, step: int, target: State) -> tuple[State, int]:
        # Each host for itself: in a common reading, one that fails would leave the
        # others waiting.
        host = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(
            primary_host=host, active_processes={host}
        )
        with ocp.Checkpointer(
            ocp.CompositeCheckpointHandler(), multiprocessing_options=alone
        ) as reader:
            try:
                restored = reader.restore(
                    self._directory / str(step),
                    args=ocp.args.Composite(
                        params=ocp.args.StandardRestore(target["params"]),
                        optimizer=ocp.args.StandardRestore(target["optimizer"]),
                        data=ocp.args.JsonRestore(),
                    ),
                )
                position = restored["data"]["position"]
            except Exception as error:
                # Orbax wraps what it met on the disk in a bare Exception.
                bare = type(error) is Exception
                met = error.__cause__ if bare else error
                if isinstance(
                    met, ValueError | FileNotFoundError | KeyError | TypeError
                ):
                    raise _Damaged(first_line(met)) from error
                if isinstance(met, OSError):
                    raise CheckpointError(
                        f"step {step} in {self._directory} cannot be read: {met}. It "
                        "may be whole: see to the disk or the network, and start again."
                    ) from error
                raise
        state = {"params": restored["params"], "optimizer": restored["optimizer"]}
        return state, position

    def _require_same_model(self, step: int, recipe: TrainingRecipe) -> None:
        saved = saved_recipe(self._directory / str(step))
        # Before there was another stage, none was written down.
        changed = differences({"stage": PretrainRecipe.stage, **saved}, recipe)
        fatal = {k: v for k, v in changed.items() if k.startswith(_FIXED)}
        if fatal:
            raise CheckpointError(
                f"step {step} in {self._directory} is of another model or stage: "
                f"{_listed(fatal)}. Use the recipe it was made with, or another "
                "--workdir."
            )
        if changed:
            _log.warning("Resuming with a changed recipe: %s.", _listed(changed))


@dataclasses.dataclass
class _Best(ocm.PreservationPolicy):
    """Preserves one step, which may change."""

    step: int | None = None

    def should_preserve(
        self,
        checkpoints: Sequence[ocm.PolicyCheckpointInfo],
        *,
        context: ocm.PreservationContext,
    ) -> Sequence[bool]:
        """Of each checkpoint, whether it is that one."""
        return [checkpoint.step == self.step for checkpoint in checkpoints]


class _Damaged(Exception):
    """A step that is listed but cannot be read."""


def saved_recipe(step_directory: epath.Path) -> Mapping[str, Any]:
    """The recipe that a step was made with.

    Raises:
      _Damaged: it is not there, or not JSON.
      CheckpointError: it is there, and the disk or the network does not give it.
    """
    try:
        handler = ocp.JsonCheckpointHandler()
        return handler.restore(step_directory / "recipe")
    except (ValueError, FileNotFoundError, NotADirectoryError) as error:
        raise _Damaged(first_line(error)) from error
    except OSError as error:
        raise CheckpointError(f"{step_directory} cannot be read: {error}.") from error


def open_run(directory: epath.PathLike) -> ParamsCheckpoint:
    """The parameters of a run: its newest step, or the step that is named.

    Args:
      directory: WORKDIR, or WORKDIR/checkpoints/STEP.

    Raises:
      CheckpointError: there is no whole step, or it is damaged.
    """
    directory = epath.Path(directory)
    if (directory / CHECKPOINTS).exists():
        steps = ocp.utils.checkpoint_steps(directory / CHECKPOINTS)
        if not steps:
            raise CheckpointError(
                f"{directory} holds no finished checkpoint yet: train until the first "
                "is saved."
            )
        directory = directory / CHECKPOINTS / str(max(steps))
    try:
        config = LlamaConfig(**saved_recipe(directory)["model"])
    except (_Damaged, KeyError, TypeError) as error:
        raise CheckpointError(f"{directory} is damaged: {error}.") from error
    tokenizer = directory.parent.parent / TOKENIZER
    return open_orbax(
        directory / "params", config, tokenizer if tokenizer.exists() else None
    )


def _listed(changed: Mapping[str, str]) -> str:
    return "; ".join(f"{field} was {change}" for field, change in changed.items())
