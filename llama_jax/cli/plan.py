"""`llama-jax plan RECIPE`: does it fit, how fast will it go, which layout is best?"""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import jax
import tyro
from rich.console import Console
from rich.progress import Progress

from llama_jax.config import LlamaConfig
from llama_jax.config.data import DataConfig
from llama_jax.config.recipe import (
    EpochRecipe,
    PpoRecipe,
    TrainingRecipe,
    load_recipe,
    to_json,
)
from llama_jax.config.train import OptimizerConfig, TrainConfig
from llama_jax.errors import PlanError
from llama_jax.planning import report
from llama_jax.planning.decode import Kept, bound_decode, plan_decode
from llama_jax.planning.energy import Power
from llama_jax.planning.plan import (
    NO_COMPILER,
    Plan,
    compiled,
    estimated,
    has_compiler,
    resolve,
)
from llama_jax.planning.plot import draw, require_matplotlib
from llama_jax.planning.ppo import PpoPlan, plan_ppo
from llama_jax.planning.search import search
from llama_jax.planning.topology import Topology, parse
from sharding import MeshConfig

_USAGE = """\
usage: llama-jax plan RECIPE [options]

RECIPE is FILE.py:FUNCTION, as configs/pretrain/llama2_7b.py:v5p_128. Each field of a
recipe is an option: `llama-jax plan RECIPE --help` lists them with the recipe's own
values. Exit status: 0 it fits; 1 it does not, or something is wrong; 2 usage.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fields:
    """A recipe but for its topology, which is an option of the command."""

    model: LlamaConfig
    data: DataConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    mesh: MeshConfig
    sequence_parallel: bool

    @classmethod
    def of(cls, recipe: TrainingRecipe) -> "Fields":
        """Those of a recipe."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: getattr(recipe, name) for name in names})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Compile a recipe for TPU chips that are not here: memory, time and cost of it.

    Attributes:
      recipe: FILE.py:FUNCTION.
      topology: a slice, as v5p:4x4x8, or the cloud's name of one, as v5p-256; by
        default the recipe's own.
      slices: how many of them, joined by the data-centre network, as replicas.
      search: try meshes, remat policies and rows per chip, and rank them.
      compiled: layouts that a search compiles, the best by arithmetic.
      processes: that compile side by side, some GB each.
      decode: plan inference with the recipe's model instead.
      batch: rows, for --decode.
      length: slots of the cache for each row, for --decode; by default the context.
      tensor: chips that share each layer, for --decode; by default as many as can.
      weights: int8 keeps matrices in one byte a number, for --decode.
      cache: int8 does so with keys and values, for --decode.
      watts_per_chip: of the power that is counted; by default an assumption.
      overhead: power of the building over that of its chips (PUE).
      kg_co2_per_kwh: of the grid; the default is the paper's.
      json: one JSON object instead of tables.
      plot: a file for a picture: roofline, and the timeline of one layer.
      dump_hlo: a file for the scheduled program.
      dry_run: resolve and check the recipe, print it with a closed-form estimate, and
        stop.
      fields: of the recipe.
    """

    recipe: tyro.conf.Positional[str]
    topology: str | None = None
    slices: int | None = None
    search: bool = False
    compiled: int = 6
    processes: int = 2
    decode: bool = False
    batch: int = 8
    length: int | None = None
    tensor: int | None = None
    weights: Kept = None
    cache: Kept = None
    watts_per_chip: float | None = None
    overhead: float = Power.overhead
    kg_co2_per_kwh: float = Power.kg_co2_per_kwh
    json: bool = False
    plot: Path | None = None
    dump_hlo: Path | None = None
    dry_run: bool = False
    fields: Annotated[Fields, tyro.conf.arg(name="")]


def run(argv: Sequence[str]) -> int:
    """The command; returns the exit status."""
    if not argv or argv[0].startswith("-"):
        asked = "--help" in argv or "-h" in argv
        print(_USAGE, end="", file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    written = load_recipe(argv[0])
    options = tyro.cli(
        Options,
        args=argv,
        prog="llama-jax plan",
        default=Options(recipe=argv[0], fields=Fields.of(written)),
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    files = options.plot or options.dump_hlo
    if files and (options.search or options.decode or options.dry_run):
        raise PlanError(
            "--plot and --dump-hlo write what one compiled step gives: leave out "
            "--search, --decode and --dry-run."
        )
    if options.search and options.decode:
        raise PlanError(
            "--search is for training and --decode for inference: give one of them."
        )
    of_decode = ("length", "tensor", "weights", "cache")
    given = [name for name in of_decode if getattr(options, name) is not None]
    if given and not options.decode:
        raise PlanError(
            f"{' and '.join(f'--{name}' for name in given)}: this is for inference, so "
            "add --decode."
        )
    if options.plot is not None:
        require_matplotlib()
    _leave_devices_alone()
    fields = vars(options.fields)
    if isinstance(written, EpochRecipe) and options.fields.train.num_steps:
        fields["epochs"] = None
    recipe = dataclasses.replace(written, **fields)
    if options.decode:
        return _decode(options, recipe)
    recipe, topology = resolve(recipe, options.topology, options.slices)
    watts = options.watts_per_chip
    power = Power(
        watts_per_chip=topology.chip.tdp_watts if watts is None else watts,
        overhead=options.overhead,
        kg_co2_per_kwh=options.kg_co2_per_kwh,
    )
    if options.dry_run:
        print(json.dumps(to_json(recipe), indent=2))
        _show(estimated(recipe, topology, power))
        return 0
    if options.search:
        return _search(options, recipe, topology, power)
    make = compiled if has_compiler() else estimated
    plan = make(recipe, topology, power)
    if isinstance(recipe, PpoRecipe):
        _show_ppo(options, plan_ppo(plan, compiles=has_compiler()))
    elif options.json:
        print(json.dumps(report.to_json(plan)))
    else:
        _show(plan)
    if not plan.fits:
        raise PlanError(f"{report.verdict(plan)} {report.remedies(plan)}")
    _write_files(options, plan)
    return 0


def _show_ppo(options: Options, plan: PpoPlan) -> None:
    if options.json:
        print(json.dumps(report.ppo_to_json(plan)))
    else:
        _console().print(report.PpoReport(plan), highlight=False)
    if plan.learning.fits and not plan.fits:
        raise PlanError(report.ppo_verdict(plan))


def _leave_devices_alone() -> None:
    """Planning computes nothing, so a TPU that is here stays free for its owner."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # for processes of a search
    jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])


def _decode(options: Options, recipe: TrainingRecipe) -> int:
    make = bound_decode if options.dry_run else plan_decode
    slices = 1 if options.slices is None else options.slices
    length = recipe.model.max_length if options.length is None else options.length
    plan = make(
        recipe.model,
        parse(options.topology or recipe.topology, slices),
        batch=options.batch,
        length=length,
        tensor=options.tensor,
        weights=options.weights,
        cache=options.cache,
    )
    if options.json:
        print(json.dumps(report.decode_to_json(plan)))
    else:
        _console().print(report.DecodeReport(plan), highlight=False)
    if not plan.fits:
        raise PlanError(report.decode_verdict(plan))
    return 0


def _search(
    options: Options, recipe: TrainingRecipe, topology: Topology, power: Power
) -> int:
    with _progress() as watch:
        found = search(
            recipe,
            topology,
            power,
            num_compiled=options.compiled,
            num_processes=options.processes,
            watch=watch,
        )
    if options.json:
        plans = (*found.plans, *found.refused)
        print(json.dumps([report.to_json(plan) for plan in plans]))
    else:
        _console().print(report.Ranking(found), highlight=False)
    return 0


def _console() -> Console:
    """Of a terminal's own width; elsewhere wide enough for every table."""
    console = Console(soft_wrap=True, markup=False)
    if not console.is_terminal:
        console.width = 160
    return console


def _show(plan: Plan) -> None:
    _console().print(report.Report(plan), highlight=False)


def _write_files(options: Options, plan: Plan) -> None:
    if options.dump_hlo is not None:
        if not plan.program:
            raise PlanError(f"there is no program to dump: {NO_COMPILER}")
        options.dump_hlo.write_text(plan.program)
    if options.plot is not None:
        draw(plan, options.plot)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Shows how many layouts are compiled, beside whatever is printed."""
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("compiling layouts", total=None)

        def watch(done: int, of: int) -> None:
            bar.update(task, completed=done, total=of)
            if not console.is_terminal:
                print(f"compiled {done} of {of} layouts", file=sys.stderr, flush=True)

        yield watch
