"""What a run of PPO keeps: all that changes, and what it began with."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from llama_jax.build import ShardedLlama
from llama_jax.checkpoint.manager import CHECKPOINTS
from llama_jax.checkpoint.params import absolute, place
from llama_jax.config.recipe import PpoRecipe
from llama_jax.data import Experience
from llama_jax.errors import CheckpointError
from llama_jax.finetune.experience import placed
from llama_jax.finetune.rollout import Judge, checksum
from llama_jax.train.metrics import METRICS, Record, read_metrics
from llama_jax.train.state import TrainState, from_items, to_items
from sharding.axes import Tree

# In the work directory: what the run began with, and its sizes.
PLAN = "ppo.json"


class Best(NamedTuple):
    """The best pass over the held-out prompts.

    Attributes:
      reward: the mean of it; -inf before there is one that counts.
      step: after which it was.
      seen: the step of the last pass.
      num_worse: passes since the best.
    """

    reward: np.float32 = np.float32(-np.inf)
    step: int = 0
    seen: int = 0
    num_worse: int = 0

    def after(self, reward: float, step: int) -> "Best":
        """With one more pass."""
        if np.float32(reward) > self.reward:
            return Best(np.float32(reward), step, step)
        return self._replace(seen=step, num_worse=self.num_worse + 1)

    def __str__(self) -> str:
        """For people, once a run ends early."""
        if not self.step:
            return (
                f"none of {self.num_worse} passes over held-out prompts was within "
                "ppo.max_kl, so what the run began with is the best"
            )
        return (
            f"held-out prompts were rewarded best, with {self.reward:.4f}, after step "
            f"{self.step}, and {self.num_worse} passes since have not beaten it"
        )


def best_pass(records: Iterable[Record], max_kl: float | None) -> Record | None:
    """The best pass over held-out prompts of a run, by its metrics.

    The first of equals, as `Best` counts them, and of those alone that are within
    `max_kl`; None without one.
    """
    passes = [
        record
        for record in records
        if "validation_reward" in record
        and (max_kl is None or record.get("validation_kl", 0.0) <= max_kl)
    ]
    return max(
        passes, key=lambda record: np.float32(record["validation_reward"]), default=None
    )


def best_policy(
    workdir: epath.PathLike, patience: int | None, max_kl: float | None
) -> epath.Path:
    """Where the policy is that a run has found best; without an early stop, the newest.

    Where no pass was within `max_kl`, it is what the run began with.

    Raises:
      CheckpointError: what the run began with is not known any more.
    """
    workdir = place(workdir)
    if patience is None:
        return workdir
    best = best_pass(read_metrics(workdir / METRICS), max_kl)
    if best is not None:
        return workdir / CHECKPOINTS / str(best["step"])
    plan = _read_plan(workdir / PLAN)
    return workdir if plan is None else place(plan["init_from"])


@dataclasses.dataclass(frozen=True)
class PpoState:
    """Everything that changes.

    Attributes:
      policy: as any training has it; its `step` is that of the run.
      critic: likewise.
      experience: of the iteration that is being learnt, [P, T], whole on every device.
      best: so far.
    """

    policy: TrainState
    critic: TrainState
    experience: Experience
    best: Best


def ppo_items(state: PpoState, sharded: ShardedLlama) -> dict[str, Tree]:
    """The state as a checkpoint has it: the policy's parameters, and all else."""
    policy, critic = to_items(state.policy), to_items(state.critic)
    best = {
        name: placed(value, sharded.sharding())
        for name, value in state.best._asdict().items()
    }
    return {
        "params": policy["params"],
        "optimizer": {
            "policy": policy["optimizer"],
            "critic": critic,
            "experience": dict(vars(state.experience)),
            "best": best,
        },
    }


def from_ppo_items(items: Mapping[str, Tree]) -> PpoState:
    """The inverse of `ppo_items`."""
    rest = items["optimizer"]
    reward, *counts = (np.asarray(rest["best"][name]) for name in Best._fields)
    return PpoState(
        policy=from_items({"params": items["params"], "optimizer": rest["policy"]}),
        critic=from_items(rest["critic"]),
        experience=Experience(**rest["experience"]),
        best=Best(np.float32(reward), *map(int, counts)),
    )


def began_as(
    workdir: epath.Path, init_from: epath.PathLike | None, recipe: PpoRecipe
) -> epath.Path:
    """What the policy begins as, or began as: given, or written down at the start."""
    if init_from is None:
        init_from = (_read_plan(workdir / PLAN) or {}).get("init_from")
    if init_from is None:
        raise CheckpointError(
            f"{recipe.stage} goes on from a model: give its checkpoint with "
            "--init-from."
        )
    return absolute(place(init_from))


def plan_of(recipe: PpoRecipe, reference: Tree, judge: Judge) -> dict[str, Any]:
    """Which models a run has, told by their parameters; its sizes, and its bound."""
    mesh = judge.safety.sharded.mesh
    return {
        "reference": checksum(reference, mesh),
        "helpfulness": checksum(judge.helpfulness.params, mesh),
        "safety": checksum(judge.safety.params, mesh),
        "critic": recipe.ppo.critic,
        "prompts": recipe.ppo.prompts,
        "batch_size": recipe.train.batch_size,
        "sequence_length": recipe.data.sequence_length,
        "compute_dtype": recipe.train.compute_dtype,
        "seed": recipe.train.seed,  # else answers of an iteration are learnt twice
        # Else the best so far was measured, or bounded, otherwise than what follows.
        "threshold": recipe.ppo.threshold,
        "max_new_tokens": recipe.ppo.max_new_tokens,
        "temperature": recipe.ppo.temperature,
        "max_kl": recipe.ppo.max_kl,
    }


def _read_plan(path: epath.Path) -> dict[str, Any] | None:
    try:
        plan = json.loads(path.read_text()) if path.exists() else None
        if plan is not None and not isinstance(plan, dict):
            raise ValueError("it is no object")
        return plan
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): remove it, and give --init-from again."
        ) from error


def require_plan(path: epath.Path, plan: Mapping[str, Any], *, resumed: bool) -> None:
    """The run has the models and sizes that it began with; the first host writes them.

    They may have moved: models are told by their parameters.
    """
    before = _read_plan(path) if resumed else None
    if before is not None:
        changes = [
            f"{name} was {before.get(name)}, now {value}"
            for name, value in plan.items()
            if name != "init_from" and before.get(name) != value
        ]
        if changes:
            raise CheckpointError(
                f"{path.parent} holds a run that began otherwise: "
                f"{'; '.join(changes)}. Go on with what it began with, or use another "
                "--workdir."
            )
    if jax.process_index() != 0 or before == plan:
        return
    try:
        partial = path.parent / f".{path.name}.partial"
        partial.write_text(json.dumps(plan, indent=2) + "\n")
        partial.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}.") from error
