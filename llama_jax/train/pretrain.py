"""A pretraining run, from the recipe to the last checkpoint."""

import dataclasses
import logging
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from etils import epath

import llama_jax
from llama_jax.build import ShardedLlama, build
from llama_jax.checkpoint.manager import RunCheckpoints
from llama_jax.checkpoint.params import TOKENIZER, place
from llama_jax.config.recipe import PretrainRecipe, differences, to_json
from llama_jax.data import TrainingData, ValidationData, open_data
from llama_jax.errors import CheckpointError, DataError
from llama_jax.llm import open_checkpoint
from llama_jax.model import param_axes
from llama_jax.model.count import abstract_params
from llama_jax.train import faults, loop
from llama_jax.train.metrics import Record, Sink
from llama_jax.train.optimizer import make_optimizer, make_schedule
from llama_jax.train.state import (
    TrainState,
    abstract_state,
    fresh_state,
    from_items,
    to_items,
)
from llama_jax.train.step import batch_sharding, make_eval_step, make_train_step
from sharding import (
    ShardingError,
    abstract_mesh,
    hosts,
    make_mesh,
    param_shardings,
    training_rules,
)
from sharding.axes import BATCH
from sharding.mesh import AnyMesh, axis_size

_log = logging.getLogger(__name__)

# float32 parameter and two moments of Adam.
_STATE_BYTES_PER_PARAM = 12


def pretrain(
    recipe: PretrainRecipe,
    workdir: epath.PathLike,
    *,
    init_from: epath.PathLike | None = None,
    profile: tuple[int, int] | None = None,
    watch: Callable[[Record], None] = lambda record: None,
) -> bool:
    """Run a recipe, or go on with it.

    It begins, in this order of preference, with the newest checkpoint in `workdir`,
    with the parameters of `init_from`, or with fresh ones.

    Args:
      recipe: all of the run.
      workdir: gets checkpoints, metrics and the tokenizer.
      init_from: any checkpoint that `llama_jax.load` reads.
      profile: first and last step to trace with `jax.profiler`.
      watch: called with every record of `metrics.jsonl`.

    Returns:
      True at the end of the recipe; False if it was asked to stop before, with all
      saved.

    Raises:
      LlamaError: see `llama_jax.errors`.
      ShardingError: mesh, model, batch and devices do not fit one another.
    """
    hosts.start()
    hosts.cache_compilations()
    workdir = place(workdir)
    settings = recipe.train
    mesh = make_mesh(recipe.mesh)
    _require_rows_divide(recipe, mesh)
    _check_data(recipe, workdir)
    sharded = build(
        recipe.model,
        mesh,
        training_rules(sequence_parallel=recipe.sequence_parallel),
        dtype=settings.compute_dtype,
        remat=settings.remat,
    )
    optimizer = make_optimizer(recipe.optimizer, settings.num_steps)
    checkpoints = RunCheckpoints(
        workdir, keep_latest=settings.keep_latest, keep_period=settings.keep_period
    )
    with checkpoints, faults.memory_advice(settings):
        state, position = _restore_or(
            init_from, recipe, sharded, optimizer, checkpoints
        )
        rows = batch_sharding(sharded)
        share = {
            "batch_size": settings.batch_size,
            "host": jax.process_index(),
            "num_hosts": jax.process_count(),
        }
        data = TrainingData(recipe.data, position=position, **share)
        validation = ValidationData(recipe.data, **share)
        with Sink(workdir, recipe, start_step=int(state.step), watch=watch) as sink:
            run = loop.Run(
                recipe=recipe,
                mesh=mesh,
                train_step=make_train_step(
                    sharded,
                    optimizer,
                    make_schedule(recipe.optimizer, settings.num_steps),
                    accumulate=settings.accumulate,
                    spike_norm=settings.spike_norm,
                ),
                eval_step=make_eval_step(sharded),
                validation=lambda: (hosts.global_rows(b, rows) for b in validation),
                checkpoints=checkpoints,
                sink=sink,
                profile=profile,
                profile_dir=str(workdir / "profile"),
            )
            batches = (hosts.global_rows(batch, rows) for batch in data)
            return loop.train(run, state, batches, position)


def check_layout(recipe: PretrainRecipe) -> str:
    """Whether mesh, model and batch divide, without the devices; and what each holds.

    Raises:
      ShardingError: they do not; says which number, and what would do.
    """
    num_devices = recipe.num_devices or jax.device_count()
    mesh = abstract_mesh(recipe.mesh, num_devices)
    _require_rows_divide(recipe, mesh)
    rules = training_rules(sequence_parallel=recipe.sequence_parallel)
    shapes = abstract_params(recipe.model)
    layout = param_shardings(rules, mesh, param_axes(), shapes)
    held = sum(
        math.prod(sharding.shard_shape(leaf.shape))
        for leaf, sharding in zip(
            jax.tree.leaves(shapes), jax.tree.leaves(layout), strict=True
        )
    )
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return (
        f"mesh {sizes} on {recipe.topology or 'the devices here'}; "
        f"{held * _STATE_BYTES_PER_PARAM / 2**30:.2f} GiB of state a device"
    )


def _require_rows_divide(recipe: PretrainRecipe, mesh: AnyMesh) -> None:
    rules = training_rules(sequence_parallel=recipe.sequence_parallel)
    parts = axis_size(mesh, rules.mesh_axes(BATCH)) * recipe.train.accumulate
    if recipe.train.batch_size % parts:
        raise ShardingError(
            f"train.batch_size {recipe.train.batch_size} does not divide over "
            f"{parts} = {' x '.join(rules.mesh_axes(BATCH))} of the mesh "
            f"{dict(mesh.shape)} x accumulate {recipe.train.accumulate}: choose a "
            f"multiple of {parts}."
        )


def _check_data(recipe: PretrainRecipe, workdir: epath.Path) -> None:
    """The data fit the model and are the same on every host; keep their tokenizer."""
    sets = open_data(recipe.data)
    for prepared in sets:
        if prepared.vocab_size > recipe.model.vocab_size:
            raise DataError(
                f"{prepared.path} was made with a tokenizer of {prepared.vocab_size} "
                f"pieces, and model.vocab_size is {recipe.model.vocab_size}: some ids "
                "would have no embedding. Prepare the data with the model's tokenizer."
            )
    hosts.require_agreement(
        recipe=to_json(recipe),
        data=[prepared.digest for prepared in sets],
        version=llama_jax.__version__,
    )
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / TOKENIZER).write_bytes((sets[0].path / TOKENIZER).read_bytes())


def _restore_or(
    init_from: epath.PathLike | None,
    recipe: PretrainRecipe,
    sharded: ShardedLlama,
    optimizer: optax.GradientTransformation,
    checkpoints: RunCheckpoints,
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
    if init_from is None:
        return fresh_state(sharded, optimizer, sharded.init(recipe.train.seed)), 0
    source = open_checkpoint(init_from, max_length=recipe.model.max_length)
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
    params = source.load(sharded.param_shardings, dtype=jnp.dtype("float32"))
    _log.info("Beginning with the parameters of %s.", init_from)
    return fresh_state(sharded, optimizer, params), 0
