"""The best layout of a recipe on a slice: all tried by arithmetic, the best compiled.

What is varied changes no result beyond the order of sums: the mesh within a slice,
what the backward pass finds saved, and how many rows a chip works on at once.
"""

import collections
import concurrent.futures.process
import dataclasses
import itertools
import multiprocessing
from collections.abc import Callable, Iterable, Iterator

from llama_jax.config.recipe import TrainingRecipe
from llama_jax.errors import PlanError
from llama_jax.planning import plan as planning
from llama_jax.planning.energy import Power
from llama_jax.planning.plan import Plan
from llama_jax.planning.topology import Topology
from sharding import ShardingError

# What the estimate puts this far above the memory there is may still fit, compiled.
_SLACK = 1.1
# Of one mesh, at most this many are compiled, so that other meshes have their chance.
_PER_MESH = 2
# Rows that the chips of one replica may work on at once.
_ROWS = (1, 2, 4, 8, 16)
# Layouts whose times differ by less are alike; the one of fewest parts is simplest.
_ALIKE = 1.01
_REMATS = ("projections", "attention_block", "attention", "full")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """What a search gives.

    Attributes:
      plans: those that fit, the fastest first; of those alike, that of fewest parts.
      refused: those that were compiled and do not fit.
      num_tried: layouts that arithmetic looked at.
      num_near: of those, how many it found to fit, or nearly so.
    """

    plans: tuple[Plan, ...]
    refused: tuple[Plan, ...]
    num_tried: int
    num_near: int


def search(
    recipe: TrainingRecipe,
    topology: Topology,
    power: Power,
    *,
    num_compiled: int,
    num_processes: int,
    watch: Callable[[int, int], None] = lambda done, of: None,
) -> Found:
    """Rank layouts of a recipe's step; its model, data and batch stay as they are.

    Without libtpu the ranking is that of the closed form, and its plans say so.

    Args:
      recipe: as `plan.resolve` gives it; its own layout is always looked at.
      topology: the slice.
      power: of a chip.
      num_compiled: layouts that are compiled, beside the recipe's own.
      num_processes: that compile side by side; each takes some GB of memory.
      watch: told how many are compiled, of how many.

    Raises:
      PlanError: nothing fits, or nothing could be compiled with such numbers.
    """
    if num_compiled < 1 or num_processes < 1:
        raise PlanError(
            f"a search that compiles {num_compiled} layouts in {num_processes} "
            "processes: give 1 or more of both."
        )
    tried = [
        planning.estimated(candidate, topology, power)
        for candidate in layouts(recipe, topology)
    ]
    near = ranked(each for each in tried if each.hbm_bytes <= _SLACK * each.hbm_limit)
    chosen = _diverse(near, num_compiled)
    if planning.has_compiler():
        own = planning.estimated(recipe, topology, power)
        recipes = list({each.recipe: None for each in [own, *chosen]})
        chosen = _compiled(recipes, topology, power, num_processes, watch)
    plans = ranked(each for each in chosen if each.fits)
    if not plans:
        least = min([*chosen, *tried], key=lambda each: each.hbm_bytes)
        raise PlanError(
            f"none of {len(tried)} layouts fits {topology.name}: the smallest takes "
            f"{least.hbm_bytes / 2**30:.1f} GiB of {least.hbm_limit / 2**30:.1f} per "
            "chip. Use a larger slice, or --optimizer.moments bfloat16."
        )
    return Found(
        plans=tuple(plans),
        refused=tuple(each for each in chosen if not each.fits),
        num_tried=len(tried),
        num_near=len(near),
    )


def layouts(recipe: TrainingRecipe, topology: Topology) -> Iterator[TrainingRecipe]:
    """Every mesh that divides the chips and the model, with every remat and row count.

    Two policies along the depth are tried where one fits and the next does not.
    """
    for meshed in _meshed(recipe, topology):
        mesh = meshed.mesh
        replicas = mesh.data * mesh.fsdp * mesh.dcn_data * mesh.dcn_fsdp
        for rows in _ROWS:
            accumulate, rest = divmod(recipe.train.batch_size, replicas * rows)
            if rest or not accumulate:
                continue
            for remat in _REMATS:
                yield _changed(meshed, remat=remat, accumulate=accumulate)
            mixed = _fullest(meshed, topology, accumulate)
            if mixed is not None:
                yield mixed


def _meshed(recipe: TrainingRecipe, topology: Topology) -> Iterator[TrainingRecipe]:
    chips = topology.num_chips // topology.slices
    sizes = [n for n in range(1, chips + 1) if chips % n == 0]
    length = recipe.data.sequence_length
    for fsdp, context, tensor in itertools.product(sizes, repeat=3):
        data, rest = divmod(chips, fsdp * context * tensor)
        # Each piece of a sequence is an early and a late part of it.
        if rest or length % (2 * context):
            continue
        mesh = dataclasses.replace(
            recipe.mesh, data=data, fsdp=fsdp, context=context, tensor=tensor
        )
        candidate = dataclasses.replace(
            recipe,
            mesh=mesh,
            sequence_parallel=tensor > 1 and length % (context * tensor) == 0,
        )
        try:
            planning.estimate(candidate, topology)
        except ShardingError:
            continue
        yield candidate


def _fullest(
    recipe: TrainingRecipe, topology: Topology, accumulate: int
) -> TrainingRecipe | None:
    """As many layers as fit save their projections, the others less."""
    num_layers = recipe.model.num_layers
    eighth = max(num_layers // 8, 1)
    for policy in _REMATS[1:]:
        fitting = None
        for num in range(eighth, num_layers, eighth):
            mixed = _changed(
                recipe, remat=f"projections:{num},{policy}", accumulate=accumulate
            )
            if planning.estimate(mixed, topology).hbm_bytes > topology.chip.hbm_bytes:
                break
            fitting = mixed
        if fitting is not None:
            return fitting
    return None


def _changed(recipe: TrainingRecipe, *, remat: str, accumulate: int) -> TrainingRecipe:
    train = dataclasses.replace(recipe.train, remat=remat, accumulate=accumulate)
    return dataclasses.replace(recipe, train=train)


def ranked(plans: Iterable[Plan]) -> list[Plan]:
    """The fastest first; of those within 1 % of the first, that of fewest parts."""
    left, order = sorted(plans, key=_step_seconds), list[Plan]()
    while left:
        most = _ALIKE * _step_seconds(left[0])
        alike = [each for each in left if _step_seconds(each) <= most]
        order += sorted(alike, key=lambda each: each.recipe.train.accumulate)
        left = left[len(alike) :]
    return order


def _step_seconds(plan: Plan) -> float:
    assert plan.step_seconds is not None
    return plan.step_seconds


def _diverse(plans: list[Plan], num: int) -> list[Plan]:
    """The first ones, but not all of one mesh."""
    taken, of_mesh = list[Plan](), collections.Counter[object]()
    for each in plans:
        if of_mesh[each.recipe.mesh] < _PER_MESH and len(taken) < num:
            of_mesh[each.recipe.mesh] += 1
            taken.append(each)
    return taken


def _compiled(
    recipes: list[TrainingRecipe],
    topology: Topology,
    power: Power,
    num_processes: int,
    watch: Callable[[int, int], None],
) -> list[Plan]:
    watch(0, len(recipes))
    with concurrent.futures.ProcessPoolExecutor(
        num_processes,
        mp_context=multiprocessing.get_context("spawn"),
        max_tasks_per_child=1,  # the compiler gives no memory back
    ) as pool:
        jobs = [pool.submit(_compile, each, topology, power) for each in recipes]
        try:
            for done, job in enumerate(concurrent.futures.as_completed(jobs), 1):
                job.result()
                watch(done, len(jobs))
        except concurrent.futures.process.BrokenProcessPool as error:
            raise PlanError(
                "a process that compiled was ended, as happens where memory is short: "
                "try --processes 1."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
    return [job.result() for job in jobs]


def _compile(recipe: TrainingRecipe, topology: Topology, power: Power) -> Plan:
    """In a process of its own; the program, which is long, stays there."""
    plan = planning.compiled(recipe, topology, power)
    return dataclasses.replace(plan, program="", profile=None)
