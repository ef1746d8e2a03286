"""PPO on a slice: five models at once, while answers are written, read and learnt.

Policy and critic learn by turns, and all other models lie beside the one that does; all
are planned to be of the policy's sizes. While answers are written, all of that stays,
and a copy of the policy for decoding comes to it, with its cache. While they are read,
all stays but that copy.
"""

import dataclasses

from llama_jax.config.recipe import PpoRecipe
from llama_jax.config.sampling import TopP
from llama_jax.generate.rows import chunks
from llama_jax.planning.decode import DecodePlan, bound_decode, plan_decode
from llama_jax.planning.estimate import beside_bytes
from llama_jax.planning.passes import PassPlan, plan_passes
from llama_jax.planning.plan import Plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class PpoPlan:
    """An iteration of PPO on a slice.

    Attributes:
      learning: of the policy's step, with the other models beside it.
      critic: of the critic's steps; None where nothing is compiled.
      writing: of prompts that are read and answered, by the copy for decoding alone.
      reading: of the answers, by each that reads them; empty where nothing is compiled.
    """

    learning: Plan
    critic: PassPlan | None
    writing: DecodePlan
    reading: tuple[PassPlan, ...]

    @property
    def recipe(self) -> PpoRecipe:
        """What is planned."""
        assert isinstance(self.learning.recipe, PpoRecipe)
        return self.learning.recipe

    @property
    def kept_bytes(self) -> int:
        """Bytes per chip of all models and optimizers, which never leave it."""
        memory = self.learning.memory
        beside = beside_bytes(self.recipe, self.learning.topology.num_chips)
        return memory["parameters"] + memory["optimizer"] + sum(beside.values())

    @property
    def writing_bytes(self) -> int:
        """Bytes per chip while prompts are read and answered."""
        return self.kept_bytes + self.writing.held_bytes

    @property
    def reading_bytes(self) -> int | None:
        """Bytes per chip while answers are read."""
        working = [each.working_bytes for each in self.reading]
        return self.kept_bytes + max(working) if working else None

    @property
    def critic_bytes(self) -> int | None:
        """Bytes per chip while the critic learns."""
        return (
            None if self.critic is None else self.kept_bytes + self.critic.working_bytes
        )

    @property
    def fits(self) -> bool:
        """Whether a chip holds each."""
        beside = (self.writing_bytes, self.reading_bytes or 0, self.critic_bytes or 0)
        return self.learning.fits and max(beside) <= self.learning.hbm_limit

    @property
    def writing_seconds(self) -> float | None:
        """Predicted, to read prompts and write answers, all as long as may be.

        Chunks of prompts are taken to have one block of slots before them, each.
        """
        ppo, plan = self.recipe.ppo, self.writing
        if plan.token_seconds is None or plan.chunk_seconds is None:
            return None
        room = self.recipe.data.sequence_length - ppo.max_new_tokens
        read = sum(size for _, size in chunks(0, room, plan.length)) / plan.chunk
        seconds = read * plan.chunk_seconds + ppo.max_new_tokens * plan.token_seconds
        return -(-ppo.prompts // ppo.decode_batch) * seconds

    @property
    def reading_seconds(self) -> float | None:
        """Predicted, for the passes over the answers of an iteration."""
        total = 0.0
        for each in self.reading:
            if each.seconds is None:
                return None
            total += each.seconds
        return total or None

    @property
    def policy_seconds(self) -> float | None:
        """Predicted, for the policy's steps of an iteration."""
        step = self.learning.step_seconds
        return step and step * self.recipe.iteration_steps

    @property
    def critic_seconds(self) -> float | None:
        """Predicted, for the critic's steps of an iteration."""
        return None if self.critic is None else self.critic.seconds


def plan_ppo(learning: Plan, *, compiles: bool) -> PpoPlan:
    """Add to the plan of a policy's steps those of its answers and its critic.

    Args:
      learning: of a `PpoRecipe`.
      compiles: whether what writes, what reads and the critic's step are, too.

    Raises:
      PlanError: the chips do not divide as `ppo.decode_tensor` says.
      ShardingError: they do not divide the model.
    """
    recipe = learning.recipe
    assert isinstance(recipe, PpoRecipe)
    make = plan_decode if compiles else bound_decode
    writing = make(
        recipe.model,
        learning.topology,
        batch=recipe.ppo.decode_batch,
        length=recipe.data.sequence_length,
        tensor=recipe.ppo.decode_tensor,
        dtype=recipe.train.compute_dtype,
        sampler=TopP(1.0, temperature=recipe.ppo.temperature),
    )
    if not (compiles and learning.fits):
        return PpoPlan(learning=learning, critic=None, writing=writing, reading=())
    *reading, critic = plan_passes(recipe, learning.topology)
    return PpoPlan(
        learning=learning, critic=critic, writing=writing, reading=tuple(reading)
    )
