"""A run of any stage, from the recipe to the last checkpoint."""

import contextlib
import dataclasses
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from etils import epath

import llama_jax
import sharding
from llama_jax.build import ShardedLlama, build_for
from llama_jax.checkpoint.manager import RunCheckpoints
from llama_jax.checkpoint.params import TOKENIZER, absolute, load_leaves, place
from llama_jax.config.recipe import TrainingRecipe, differences, to_json
from llama_jax.config.train import TrainConfig
from llama_jax.conversion import AnyCheckpoint, open_any
from llama_jax.conversion.proof import require_files
from llama_jax.data import Prepared, TrainingData, ValidationData, open_data
from llama_jax.data.prepare import TRAIN
from llama_jax.data.prepared import Kind
from llama_jax.errors import CheckpointError, ConfigError, DataError
from llama_jax.model.count import abstract_params
from llama_jax.text import Tokenizer
from llama_jax.train import faults, loop
from llama_jax.train.layout import require_division
from llama_jax.train.metrics import Record, Sink
from llama_jax.train.objective import NextToken, Objective
from llama_jax.train.optimizer import make_optimizer, make_schedule
from llama_jax.train.state import (
    TrainState,
    abstract_state,
    fresh_state,
    from_items,
    to_items,
)
from llama_jax.train.step import batch_sharding, make_eval_step, make_train_step
from sharding import hosts, make_mesh
from sharding.axes import Tree

_log = logging.getLogger(__name__)

# In the work directory: the path of the model that the run went on from.
BEGINNING = "init_from.txt"


@dataclasses.dataclass(frozen=True)
class Stage:
    """What tells one kind of run from another.

    Attributes:
      reads: what its data are made of.
      needs_model: it goes on from a model, and makes no parameters of its own.
      objective: what a recipe of it makes small.
    """

    reads: Kind
    needs_model: bool
    objective: Callable[[Any], Objective] = lambda recipe: NextToken()


def run(
    stage: Stage,
    recipe: TrainingRecipe,
    workdir: epath.PathLike,
    *,
    init_from: epath.PathLike | None,
    profile: tuple[int, int] | None,
    watch: Callable[[Record], None],
) -> bool:
    """Run a recipe of a stage, or go on with it: see `pretrain`."""
    with hosts_joined(recipe.train) as guard:
        return _run(stage, recipe, place(workdir), init_from, profile, watch, guard)


@contextlib.contextmanager
def hosts_joined(settings: TrainConfig) -> Iterator[faults.Guard]:
    """Within this all hosts run together, and end together; what says when to stop."""
    waiting = {
        "heartbeat_seconds": settings.heartbeat_seconds,
        "join_seconds": settings.join_seconds,
    }
    with faults.together(**waiting), faults.guard(settings) as guard:
        yield guard


def _run(
    stage: Stage,
    recipe: TrainingRecipe,
    workdir: epath.Path,
    init_from: epath.PathLike | None,
    profile: tuple[int, int] | None,
    watch: Callable[[Record], None],
    guard: faults.Guard,
) -> bool:
    sets = agreed_data(stage, recipe, workdir=str(workdir), init_from=str(init_from))
    recipe = recipe.with_steps(num_training_rows(sets))
    guard.settings = settings = recipe.train
    sharded, objective = built(recipe), stage.objective(recipe)
    mesh = sharded.mesh
    optimizer = make_optimizer(recipe.optimizer, settings.num_steps)
    checkpoints = RunCheckpoints(
        workdir, keep_latest=settings.keep_latest, keep_period=settings.keep_period
    )
    with checkpoints, faults.host_loss(), faults.memory_advice(settings):
        hosts.require_agreement(checkpoints=checkpoints.steps)
        with hosts.failing_together():
            keep_tokenizer(workdir, sets[0], resumed=bool(checkpoints.steps))
            keep_beginning(workdir, init_from, resumed=bool(checkpoints.steps))
        state, position = _restore_or(
            stage, init_from, recipe, sharded, optimizer, checkpoints, sets[0]
        )
        rows = batch_sharding(sharded)
        share = {
            "batch_size": settings.batch_size,
            "host": jax.process_index(),
            "num_hosts": jax.process_count(),
        }
        start_step = int(state.step)
        with hosts.failing_together():
            data = TrainingData(recipe.data, position=position, **share)
            validation = ValidationData(recipe.data, **share)
            sink = Sink(workdir, recipe, start_step=start_step, watch=watch)
        with sink:
            run = loop.Run(
                recipe=recipe,
                mesh=mesh,
                train_step=make_train_step(
                    sharded,
                    optimizer,
                    make_schedule(recipe.optimizer, settings.num_steps),
                    accumulate=settings.accumulate,
                    spike_norm=settings.spike_norm,
                    objective=objective,
                ),
                eval_step=make_eval_step(sharded, objective),
                objective=objective,
                validation=lambda: (hosts.global_rows(b, rows) for b in validation),
                checkpoints=checkpoints,
                sink=sink,
                guard=guard,
                profile=profile,
                profile_dir=str(workdir / "profile"),
            )
            batches = (hosts.global_rows(batch, rows) for batch in data)
            return loop.train(run, state, batches, position)


def built(recipe: TrainingRecipe) -> ShardedLlama:
    """The model of a recipe on the mesh of all devices.

    Raises:
      ConfigError: its kernel does not run here.
      ShardingError: mesh, model, batch and devices do not fit one another.
    """
    mesh = make_mesh(recipe.mesh)
    if recipe.train.attention == "splash" and jax.default_backend() != "tpu":
        raise ConfigError(
            f"train.attention 'splash' is a kernel for TPUs, and this is "
            f"{jax.default_backend()}: use --train.attention dot."
        )
    require_division(recipe, mesh)
    return build_for(recipe, mesh)


def agreed_data(stage: Stage, recipe: TrainingRecipe, **facts: str) -> list[Prepared]:
    """The data, opened; every host has the same, and they fit stage and model."""
    problem, sets = "", list[Prepared]()
    try:
        sets = open_data(recipe.data)
    except DataError as error:
        problem = str(error)  # raised below, after all hosts have said what they see
    hosts.require_agreement(
        recipe=to_json(recipe),
        data=[prepared.digest for prepared in sets] or problem,
        code=_code_digest(),
        **facts,
    )
    if problem:
        raise DataError(problem)
    for prepared in sets:
        if prepared.kind != stage.reads:
            raise DataError(
                f"{prepared.path} holds {prepared.kind}, and {recipe.stage} reads "
                f"{stage.reads}: choose other data, or a recipe of another stage."
            )
        for split in (TRAIN, recipe.data.validation_split):
            if split not in prepared.splits:
                raise DataError(
                    f"{prepared.path} has no split {split!r}: it has "
                    f"{', '.join(map(repr, prepared.splits))}. Prepare it with both, "
                    "one to train on and one held out."
                )
        if prepared.vocab_size > recipe.model.vocab_size:
            raise DataError(
                f"{prepared.path} was made with a tokenizer of {prepared.vocab_size} "
                f"pieces, and model.vocab_size is {recipe.model.vocab_size}: some ids "
                "would have no embedding. Prepare the data with the model's tokenizer."
            )
    return sets


def num_training_rows(sets: Sequence[Prepared]) -> int:
    """Rows to train on of the first data set, which epochs count."""
    return sets[0].splits[TRAIN].num_rows


def _code_digest() -> str:
    """Of the versions and of every source file: one host may have been forgotten."""
    digest = hashlib.sha256(f"{llama_jax.__version__} {jax.__version__}".encode())
    for package in (llama_jax, sharding):
        for path in sorted(Path(package.__path__[0]).rglob("*.py")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def keep_tokenizer(workdir: epath.Path, data: Prepared, *, resumed: bool) -> None:
    """Put the tokenizer of the data beside the checkpoints; the first host does."""
    if jax.process_index() != 0:
        return
    kept, source = workdir / TOKENIZER, data.path / TOKENIZER
    try:
        content = source.read_bytes()
        if resumed and kept.exists() and kept.read_bytes() != content:
            raise CheckpointError(
                f"{workdir} holds a run with another tokenizer than {data.path}: its "
                "ids mean other text. Use another --workdir."
            )
        kept.write_bytes(content)
    except OSError as error:
        raise CheckpointError(f"{kept} cannot be written: {error}.") from error


def keep_beginning(
    workdir: epath.Path, init_from: epath.PathLike | None, *, resumed: bool
) -> None:
    """Write down what a run goes on from, or see that it did; the first host does."""
    if jax.process_index() != 0:
        return
    kept = workdir / BEGINNING
    asked = None if init_from is None else str(absolute(epath.Path(init_from)))
    try:
        before = kept.read_text().strip() if kept.exists() else None
        if resumed and asked not in (None, before):
            _log.warning(
                "%s holds a run that began with %s, and goes on from its own "
                "checkpoint: %s is not read. If that is another model and not the same "
                "at a new place, use another --workdir.",
                workdir,
                before or "no other model",
                asked,
            )
        elif not resumed and asked is not None:
            kept.write_text(f"{asked}\n")
        elif not resumed:
            kept.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"{kept} cannot be written: {error}.") from error


def _restore_or(
    stage: Stage,
    init_from: epath.PathLike | None,
    recipe: TrainingRecipe,
    sharded: ShardedLlama,
    optimizer: optax.GradientTransformation,
    checkpoints: RunCheckpoints,
    data: Prepared,
) -> tuple[TrainState, int]:
    """Resume, else warm start, else fresh parameters; and the place in the data."""
    restored = checkpoints.restore(
        to_items(abstract_state(sharded, optimizer)),
        recipe,
        on_damaged=recipe.train.on_damaged_checkpoint,
    )
    if restored is not None:
        items, position = restored
        state = from_items(items)
        _log.info("Going on from step %d.", int(state.step))
        return state, position
    if init_from is None and stage.needs_model:
        raise CheckpointError(
            f"{recipe.stage} goes on from a model: give its checkpoint with "
            "--init-from."
        )
    if init_from is None:
        return fresh_state(sharded, optimizer, sharded.init(recipe.train.seed)), 0
    source = open_model(init_from, recipe, data)
    params = load_params(source, sharded, recipe)
    _log.info("Beginning with the parameters of %s.", init_from)
    return fresh_state(sharded, optimizer, params), 0


def open_model(
    init_from: epath.PathLike, recipe: TrainingRecipe, data: Prepared
) -> AnyCheckpoint:
    """Open what a run begins with; it is of the recipe's sizes, and reads the data.

    Raises:
      CheckpointError: it cannot be read, is of another model, or writes nothing.
      DataError: the data were made with another tokenizer.
    """
    source = open_any(init_from, max_length=recipe.model.max_length)
    require_files(source)
    if source.head == "scalar" and recipe.head == "unembed":
        raise CheckpointError(
            f"{source.directory} is a reward model, and {recipe.stage} goes on from "
            "one that writes: give that with --init-from."
        )
    other = {
        field: change
        for field, change in differences(
            to_json(recipe) | {"model": dataclasses.asdict(source.config)}, recipe
        ).items()
        if field != "model.max_length"  # a longer context is a usual second phase
    }
    if other:
        raise CheckpointError(
            f"{init_from} is of another model than the recipe: "
            + "; ".join(f"{field} is {change}" for field, change in other.items())
            + ". Use a recipe of its sizes."
        )
    if source.tokenizer_path is not None:
        data.require_tokenizer(Tokenizer(source.tokenizer_path).digest)
    return source


def load_params(
    source: AnyCheckpoint, sharded: ShardedLlama, recipe: TrainingRecipe
) -> Tree:
    """The parameters of a checkpoint; a head that gives a number is made if need be.

    Raises:
      CheckpointError: files are damaged.
    """
    dtype, layout = jnp.dtype("float32"), sharded.param_shardings
    if source.head == sharded.head:
        return source.load(layout, dtype=dtype)
    assert sharded.head == "scalar", source.head
    shapes = abstract_params(sharded.config, sharded.head)
    shared = [name for name in shapes if name != sharded.head]
    body = load_leaves(
        source.read,
        {name: shapes[name] for name in shared},
        {name: layout[name] for name in shared},
        dtype=dtype,
    )
    return {**body, sharded.head: sharded.init_head(recipe.train.seed)}
