"""A pretraining run, from the recipe to the last checkpoint."""

import dataclasses
import hashlib
import logging
import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from etils import epath

import llama_jax
import sharding
from llama_jax.build import ShardedLlama, build_for, params_layout
from llama_jax.checkpoint.manager import RunCheckpoints
from llama_jax.checkpoint.params import TOKENIZER, place
from llama_jax.config.recipe import PretrainRecipe, differences, to_json
from llama_jax.conversion import open_checkpoint
from llama_jax.conversion.proof import require_files
from llama_jax.data import Prepared, TrainingData, ValidationData, open_data
from llama_jax.errors import CheckpointError, ConfigError, DataError
from llama_jax.model.count import abstract_params
from llama_jax.model.flash import Blocks
from llama_jax.text import Tokenizer
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
    context,
    hosts,
    make_mesh,
    training_rules,
)
from sharding.axes import BATCH, SEQUENCE, VOCAB
from sharding.mesh import AnyMesh, axis_size

_log = logging.getLogger(__name__)


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

    On several hosts an error ends the process, with its message and status 1, and the
    loss of another host with `faults.EXIT_HOST_LOST`.
    """
    hosts.start(
        heartbeat_seconds=recipe.train.heartbeat_seconds,
        join_seconds=recipe.train.join_seconds,
        lost_status=faults.EXIT_HOST_LOST,
    )
    hosts.cache_compilations()
    with (
        faults.shared_fate(),
        faults.host_loss(),
        faults.guard(recipe.train) as guard,
    ):
        return _run(recipe, place(workdir), init_from, profile, watch, guard)


def _run(
    recipe: PretrainRecipe,
    workdir: epath.Path,
    init_from: epath.PathLike | None,
    profile: tuple[int, int] | None,
    watch: Callable[[Record], None],
    guard: faults.Guard,
) -> bool:
    settings = recipe.train
    sets = _agreed_data(recipe, workdir=str(workdir), init_from=str(init_from))
    mesh = make_mesh(recipe.mesh)
    _require_rows_divide(recipe, mesh)
    sharded = build_for(recipe, mesh)
    if settings.attention == "splash" and jax.default_backend() != "tpu":
        raise ConfigError(
            f"train.attention 'splash' is a kernel for TPUs, and this is "
            f"{jax.default_backend()}: use --train.attention dot."
        )
    _require_chunks_divide(recipe, mesh)
    _require_tiles_divide(recipe, mesh)
    optimizer = make_optimizer(recipe.optimizer, settings.num_steps)
    checkpoints = RunCheckpoints(
        workdir, keep_latest=settings.keep_latest, keep_period=settings.keep_period
    )
    with checkpoints, faults.host_loss(), faults.memory_advice(settings):
        hosts.require_agreement(checkpoints=checkpoints.steps)
        with hosts.failing_together():
            _keep_tokenizer(workdir, sets[0], resumed=bool(checkpoints.steps))
        state, position = _restore_or(
            init_from, recipe, sharded, optimizer, checkpoints, sets[0]
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
                ),
                eval_step=make_eval_step(sharded),
                validation=lambda: (hosts.global_rows(b, rows) for b in validation),
                checkpoints=checkpoints,
                sink=sink,
                guard=guard,
                profile=profile,
                profile_dir=str(workdir / "profile"),
            )
            batches = (hosts.global_rows(batch, rows) for batch in data)
            return loop.train(run, state, batches, position)


def check_layout(recipe: PretrainRecipe) -> str:
    """Whether mesh, model and batch divide, without the devices; and what each holds.

    Raises:
      ShardingError: they do not; says which number, and what would do.
      ConfigError: rows do not divide into the tiles of the attention kernel.
    """
    num_devices = recipe.num_devices or jax.device_count()
    mesh = abstract_mesh(recipe.mesh, num_devices)
    _require_rows_divide(recipe, mesh)
    rules = training_rules(sequence_parallel=recipe.sequence_parallel)
    shapes = abstract_params(recipe.model)
    layout = params_layout(recipe.model, mesh, rules)
    _require_chunks_divide(recipe, mesh)
    _require_tiles_divide(recipe, mesh)
    held = sum(
        math.prod(leaf_layout.shard_shape(leaf.shape))
        for leaf, leaf_layout in zip(
            jax.tree.leaves(shapes), jax.tree.leaves(layout), strict=True
        )
    )
    # Parameters are float32, and Adam has two moments of each.
    held *= 4 + 2 * jnp.dtype(recipe.optimizer.moments).itemsize
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return (
        f"mesh {sizes} on {recipe.topology or 'the devices here'}; "
        f"{held / 2**30:.2f} GiB of state a device"
    )


def _require_rows_divide(recipe: PretrainRecipe, mesh: AnyMesh) -> None:
    rules = training_rules(sequence_parallel=recipe.sequence_parallel)
    context.require_positions_divide(mesh, rules, recipe.data.sequence_length)
    parts = axis_size(mesh, rules.mesh_axes(BATCH)) * recipe.train.accumulate
    if recipe.train.batch_size % parts:
        raise ShardingError(
            f"train.batch_size {recipe.train.batch_size} does not divide over "
            f"{parts} = {' x '.join(rules.mesh_axes(BATCH))} of the mesh "
            f"{dict(mesh.shape)} x accumulate {recipe.train.accumulate}: choose a "
            f"multiple of {parts}."
        )
    if axis_size(mesh, rules.mesh_axes(BATCH)) % jax.process_count():
        raise ShardingError(
            f"{' x '.join(rules.mesh_axes(BATCH))} of the mesh {dict(mesh.shape)} do "
            f"not split the batch over {jax.process_count()} hosts, each of which "
            "reads rows of its own: keep tensor and context within a host's chips."
        )


def _require_chunks_divide(recipe: PretrainRecipe, mesh: AnyMesh) -> None:
    rules = training_rules(sequence_parallel=recipe.sequence_parallel)
    pieces = recipe.model.vocab_size // axis_size(mesh, rules.mesh_axes(VOCAB))
    if pieces % recipe.train.loss_chunks:
        fits = [n for n in range(1, 129) if pieces % n == 0]
        raise ShardingError(
            f"train.loss_chunks {recipe.train.loss_chunks} does not divide the "
            f"{pieces} pieces of the vocabulary on each device of mesh axes "
            f"{' x '.join(rules.mesh_axes(VOCAB))}: choose it from {fits}."
        )


def _require_tiles_divide(recipe: PretrainRecipe, mesh: AnyMesh) -> None:
    rules = training_rules(sequence_parallel=recipe.sequence_parallel)
    parts = axis_size(mesh, rules.mesh_axes(SEQUENCE))
    ring = parts > 1 and recipe.train.context_attention == "ring"
    if recipe.train.attention == "splash" and not ring:
        Blocks().within(recipe.data.sequence_length // parts)


def _agreed_data(recipe: PretrainRecipe, **facts: str) -> list[Prepared]:
    """The data, opened; every host has the same, and they fit the model."""
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
        if prepared.vocab_size > recipe.model.vocab_size:
            raise DataError(
                f"{prepared.path} was made with a tokenizer of {prepared.vocab_size} "
                f"pieces, and model.vocab_size is {recipe.model.vocab_size}: some ids "
                "would have no embedding. Prepare the data with the model's tokenizer."
            )
    return sets


def _code_digest() -> str:
    """Of the versions and of every source file: one host may have been forgotten."""
    digest = hashlib.sha256(f"{llama_jax.__version__} {jax.__version__}".encode())
    for package in (llama_jax, sharding):
        for path in sorted(Path(package.__path__[0]).rglob("*.py")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _keep_tokenizer(workdir: epath.Path, data: Prepared, *, resumed: bool) -> None:
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


def _restore_or(
    init_from: epath.PathLike | None,
    recipe: PretrainRecipe,
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
    if init_from is None:
        return fresh_state(sharded, optimizer, sharded.init(recipe.train.seed)), 0
    source = open_checkpoint(init_from, max_length=recipe.model.max_length)
    require_files(source)
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
    params = source.load(sharded.param_shardings, dtype=jnp.dtype("float32"))
    _log.info("Beginning with the parameters of %s.", init_from)
    return fresh_state(sharded, optimizer, params), 0
