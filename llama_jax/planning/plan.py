"""`plan`: does a recipe fit a slice of chips, and how fast will it run there?"""

import dataclasses
import importlib.util
from collections.abc import Mapping
from typing import Literal

from llama_jax.config.recipe import TrainingRecipe, load_recipe
from llama_jax.errors import PlanError
from llama_jax.model.count import train_flops_per_token
from llama_jax.planning import programs
from llama_jax.planning import topology as tpu
from llama_jax.planning.energy import Power
from llama_jax.planning.estimate import beside_bytes, estimate
from llama_jax.planning.schedule import Collective, Placement, Profile, predict
from llama_jax.planning.topology import Topology
from llama_jax.train.layout import check_layout

Source = Literal["compiled", "closed-form estimate"]

NO_COMPILER = (
    "libtpu, the TPU compiler, is not installed. It gives facts, on any x86 Linux: "
    "pip install 'llama-jax[tpu]'."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A recipe on a slice. All times are predicted, per step unless they say else.

    Attributes:
      recipe: as it was planned, its mesh resolved.
      topology: the slice.
      source: whether the figures come from the compiler or from arithmetic.
      memory: bytes per chip at the fullest moment, by kind.
      hbm_limit: bytes that a program may have.
      host_bytes: kept in the host's memory, per chip.
      seconds: of a step, by what they are spent on; empty where there is no program.
      collectives: of a step.
      power: what a chip draws.
      profile: of the compiled program; None if there is none.
      program: its text; "" if there is none.
    """

    recipe: TrainingRecipe
    topology: Topology
    source: Source
    memory: Mapping[str, int]
    hbm_limit: int
    host_bytes: int
    seconds: Mapping[str, float]
    collectives: tuple[Collective, ...]
    power: Power
    profile: Profile | None = dataclasses.field(repr=False)
    program: str = dataclasses.field(repr=False)

    @property
    def hbm_bytes(self) -> int:
        """Bytes per chip at the fullest moment."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether a chip holds it."""
        return self.hbm_bytes <= self.hbm_limit

    @property
    def rows_per_chip(self) -> float:
        """Rows that a chip works on at once; a part of one under `context`."""
        train = self.recipe.train
        return train.batch_size / self.topology.num_chips / train.accumulate

    @property
    def tokens_per_step(self) -> int:
        """Tokens of all chips."""
        return self.recipe.train.batch_size * self.recipe.data.sequence_length

    @property
    def step_seconds(self) -> float | None:
        """Predicted; None where there is no program."""
        return sum(self.seconds.values()) or None

    @property
    def tokens_per_second(self) -> float | None:
        """Predicted, of all chips."""
        step_seconds = self.step_seconds
        return step_seconds and self.tokens_per_step / step_seconds

    @property
    def mfu(self) -> float | None:
        """Predicted share of the chips' peak that the model's own FLOPs make up."""
        rate = self.tokens_per_second
        flops = train_flops_per_token(
            self.recipe.model, self.recipe.data.sequence_length, self.recipe.head
        )
        peak = self.topology.chip.peak_flops * self.topology.num_chips
        return rate and rate * flops / peak

    @property
    def days(self) -> float | None:
        """Predicted, of all steps of the recipe, without interruption.

        None, too, where the recipe counts epochs: the data say how many steps they are.
        """
        step_seconds, num_steps = self.step_seconds, self.recipe.train.num_steps
        return step_seconds * num_steps / 86_400 if step_seconds and num_steps else None

    @property
    def chip_hours(self) -> float | None:
        """Predicted, of those days."""
        days = self.days
        return days and days * 24 * self.topology.num_chips

    @property
    def energy_kwh(self) -> float | None:
        """Predicted, the building's overhead included."""
        hours = self.chip_hours
        return hours and self.power.energy_kwh(hours)

    @property
    def co2_tonnes(self) -> float | None:
        """Predicted, CO2 equivalents by the paper's formula."""
        hours = self.chip_hours
        return hours and self.power.co2_tonnes(hours)


def plan(
    recipe: TrainingRecipe | str,
    topology: str | None = None,
    slices: int | None = None,
    *,
    power: Power | None = None,
) -> Plan:
    """Compile a recipe's training step for TPU chips that need not be here.

    Where libtpu, the compiler, is not installed, the plan is a closed-form estimate and
    its `source` says so.

    Args:
      recipe: what to run, or FILE.py:FUNCTION.
      topology: a slice, as "v5p:4x4x8" or "v5p-256"; the recipe's own by default.
      slices: how many of them, as replicas; the recipe's own number by default.
      power: of a chip; by default its (assumed) design power and the paper's grid.

    Raises:
      PlanError: no such topology, or a compiler that fails.
      ShardingError: mesh, model, batch and topology do not divide.
    """
    recipe, chips = resolve(recipe, topology, slices)
    power = power or Power(watts_per_chip=chips.chip.tdp_watts)
    if not has_compiler():
        return estimated(recipe, chips, power)
    return compiled(recipe, chips, power)


def resolve(
    recipe: TrainingRecipe | str, topology: str | None, slices: int | None
) -> tuple[TrainingRecipe, Topology]:
    """A recipe put on a topology, with the factors of its mesh resolved.

    Raises:
      PlanError: no such topology, or none is named.
      ShardingError: mesh, model, batch and topology do not divide.
    """
    if isinstance(recipe, str):
        recipe = load_recipe(recipe)
    mesh = recipe.mesh
    if slices is not None and slices != mesh.num_slices:
        mesh = dataclasses.replace(mesh, dcn_data=slices, dcn_fsdp=1)
    name = topology or recipe.topology
    if not name:
        raise PlanError(
            "the recipe is for any devices: name a topology, as --topology v5p:4x4x4."
        )
    chips = tpu.parse(name, mesh.num_slices)
    mesh = mesh.resolve(chips.num_chips)
    placed = dataclasses.replace(recipe, mesh=mesh, topology=chips.name)
    check_layout(placed)
    return placed, chips


def has_compiler() -> bool:
    """Whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


def compiled(recipe: TrainingRecipe, topology: Topology, power: Power) -> Plan:
    """What the compiler makes of a recipe that `resolve` gave."""
    step = programs.compiled(recipe, topology)
    profile = None
    seconds = dict[str, float]()
    if step.fits:
        profile = predict(step.text, topology, Placement.of(step.mesh))
        seconds = {
            "matmul": profile.work["matmul"],
            "attention": profile.work["attention"],
            "other compute": profile.work["other"],
            "exposed communication": profile.communication_seconds,
            "exposed copies": profile.exposed["dma"] + profile.exposed["host"],
        }
    return Plan(
        recipe=recipe,
        topology=topology,
        source="compiled",
        memory={
            "parameters": step.memory.parameters,
            "optimizer": step.memory.optimizer,
            "activations, gradients": step.memory.activations,
            **beside_bytes(recipe, topology.num_chips),
        },
        hbm_limit=step.memory.limit,
        host_bytes=step.memory.host,
        seconds=seconds,
        collectives=profile.collectives if profile else (),
        power=power,
        profile=profile,
        program=step.text,
    )


def estimated(recipe: TrainingRecipe, topology: Topology, power: Power) -> Plan:
    """What arithmetic says of a recipe that `resolve` gave."""
    found = estimate(recipe, topology)
    return Plan(
        recipe=recipe,
        topology=topology,
        source="closed-form estimate",
        memory=found.memory,
        hbm_limit=topology.chip.hbm_bytes,
        host_bytes=0,
        seconds=found.seconds,
        collectives=found.collectives,
        power=power,
        profile=None,
        program="",
    )
