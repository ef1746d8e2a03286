"""A setting that changes nothing is an error: each field, perturbed, is seen."""

import ast
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.build import build_for
from llama_jax.config import LlamaConfig
from llama_jax.config.data import DataConfig
from llama_jax.config.finetune import PpoConfig, RewardConfig
from llama_jax.config.recipe import (
    PpoRecipe,
    PretrainRecipe,
    RewardRecipe,
    SftRecipe,
    paper_optimizer,
)
from llama_jax.config.train import OptimizerConfig, TrainConfig
from llama_jax.errors import ConfigError
from llama_jax.model import Llama, param_axes
from llama_jax.model.count import abstract_params
from llama_jax.train.optimizer import make_optimizer, make_schedule
from llama_jax.train.pretrain import pretrain
from sharding import AxisRules, MeshConfig, ShardingError, axes, hosts, make_mesh
from tests import runs
from tests.architecture.tree import ROOT

MODEL = LlamaConfig(
    vocab_size=16,
    dim=16,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    hidden_dim=8,
    norm_eps=1e-5,
    rope_theta=1e4,
    max_length=8,
)
OTHER_MODEL = {
    "vocab_size": 17,
    "dim": 24,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 4,
    "hidden_dim": 9,
    "norm_eps": 1e-2,
    "rope_theta": 10.0,
    "max_length": 4,
}
OPTIMIZER = paper_optimizer(peak_lr=0.1, warmup_steps=2)
OTHER_OPTIMIZER = {
    "peak_lr": 0.2,
    "final_lr_fraction": 0.5,
    "warmup_steps": 3,
    "beta1": 0.5,
    "beta2": 0.5,
    "eps": 1e-1,
    "weight_decay": 0.5,
    "clip_norm": 0.5,
    "moments": "bfloat16",
    "warmup_fraction": 0.75,
}
# The mesh axis that each factor makes longer.
MESH_AXIS = {
    "data": "data",
    "fsdp": "fsdp",
    "context": "context",
    "tensor": "tensor",
    "dcn_data": "data",
    "dcn_fsdp": "fsdp",
}


def _fields(config) -> set[str]:
    return {field.name for field in dataclasses.fields(config)}


def _what_a_model_shows(config: LlamaConfig):
    """Shapes of the parameters, logits, and whether rows of 8 tokens may train it."""
    shapes = jax.tree.map(lambda leaf: leaf.shape, abstract_params(config))
    model = Llama(config)
    params = jax.tree.map(
        lambda shape: 0.5 * jnp.cos(jnp.arange(np.prod(shape)).reshape(shape)),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    logits = jax.jit(model.apply)({"params": params}, jnp.array([[1, 2, 3]]))
    try:
        PretrainRecipe(
            model=config,
            data=DataConfig(paths=("data",), sequence_length=8, seed=0),
            optimizer=OPTIMIZER,
            train=TRAIN,
            mesh=MeshConfig(),
            sequence_parallel=False,
            topology="",
        )
        allowed = True
    except ConfigError:
        allowed = False
    return shapes, np.asarray(logits).round(5).tolist(), allowed


TRAIN = TrainConfig(
    num_steps=4,
    batch_size=8,
    accumulate=1,
    compute_dtype="float32",
    remat="none",
    seed=0,
    validate_every=2,
    checkpoint_every=2,
    keep_latest=1,
    keep_period=0,
    on_bad_step="stop",
)


@pytest.fixture(scope="module")
def model_shows():
    return _what_a_model_shows(MODEL)


def test_the_tables_are_complete():
    assert OTHER_MODEL.keys() == _fields(LlamaConfig)
    assert OTHER_OPTIMIZER.keys() == _fields(OptimizerConfig)
    assert MESH_AXIS.keys() == _fields(MeshConfig)


@pytest.mark.parametrize("field", OTHER_MODEL)
def test_each_field_of_the_model(field, model_shows):
    other = dataclasses.replace(MODEL, **{field: OTHER_MODEL[field]})
    assert _what_a_model_shows(other) != model_shows


def _three_updates(config: OptimizerConfig):
    optimizer = make_optimizer(config, 4)
    params = {"kernel": jnp.array([1.0, -2.0, 3.0])}
    state = optimizer.init(params)
    updates = []
    for number in range(3):
        gradient = {"kernel": jnp.array([1.0, 0.3, -0.2]) * (1 + number)}
        update, state = optimizer.update(gradient, state, params)
        updates.append(np.asarray(update["kernel"]).round(7).tolist())
    return updates, float(make_schedule(config, 4)(4))


@pytest.fixture(scope="module")
def optimizer_shows():
    return _three_updates(OPTIMIZER)


@pytest.mark.parametrize("field", OTHER_OPTIMIZER)
def test_each_field_of_the_optimizer(field, optimizer_shows):
    other = dataclasses.replace(OPTIMIZER, **{field: OTHER_OPTIMIZER[field]})
    assert _three_updates(other) != optimizer_shows


@pytest.mark.parametrize(("field", "axis"), MESH_AXIS.items())
def test_each_field_of_the_mesh(field, axis):
    mesh = make_mesh(MeshConfig(**{"fsdp": 1, field: 2}), jax.devices()[:2])
    assert {name for name, size in mesh.shape.items() if size == 2} == {axis}


def test_each_logical_axis_names_a_dimension_of_the_model():
    """So each rule splits something: a rule for an axis that nothing has is dead."""
    leaves = jax.tree.leaves(param_axes(), is_leaf=lambda node: isinstance(node, tuple))
    named = {name for names in leaves for name in names}

    def spy(x, *names):
        assert x.ndim == len(names)
        named.update(names)
        return x

    model = Llama(MODEL, constrain=spy)
    tokens = jnp.zeros((1, 4), jnp.int32)
    jax.eval_shape(lambda p: model.apply({"params": p}, tokens), abstract_params(MODEL))
    assert named == {*axes.LOGICAL_AXES, None}
    assert _fields(AxisRules) == set(axes.LOGICAL_AXES)


def _attributes_read() -> set[str]:
    """Names after a dot that the packages read, outside of where settings are made."""
    read = set()
    for package in ("llama_jax", "sharding"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if "config" in path.parts:
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                    read.add(node.attr)
    return read


# Settings of a run that change the model as it is built, on two devices of a row.
OTHER_BUILT = {
    "compute_dtype": "bfloat16",
    "remat": "full",
    "loss_chunks": 2,
    "attention": "splash",
    "context_attention": "gathered",
}


@pytest.mark.parametrize("field", OTHER_BUILT)
def test_each_setting_of_what_is_built(field):
    mesh = make_mesh(MeshConfig(fsdp=1, context=2), jax.devices()[:2])
    # The kernel of `attention` is for rows that are gathered: a ring has its own.
    plain = {"context_attention": "gathered"} if field == "attention" else {}

    def built(**settings):
        sharded = build_for(
            PretrainRecipe(
                model=MODEL,
                data=DataConfig(paths=("data",), sequence_length=8, seed=0),
                optimizer=OPTIMIZER,
                train=dataclasses.replace(TRAIN, **plain | settings),
                mesh=MeshConfig(),
                sequence_parallel=False,
                topology="",
            ),
            mesh,
        )
        return sharded.model, sharded.loss_chunks

    assert built() == built()
    assert built(**{field: OTHER_BUILT[field]}) != built()


def test_each_setting_of_several_hosts(monkeypatch):
    given = {}

    def start(**settings):
        given.update(settings)
        raise ShardingError("enough is seen")

    monkeypatch.setattr(hosts, "start", start)
    recipe = runs.recipe("data")
    other = {"heartbeat_seconds": 7, "join_seconds": 11}
    with pytest.raises(ShardingError, match="enough"):
        pretrain(runs.changed(recipe, "train", **other), "unused")
    assert other.items() <= given.items()


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig,
        DataConfig,
        PretrainRecipe,
        SftRecipe,
        RewardRecipe,
        RewardConfig,
        PpoRecipe,
        PpoConfig,
    ],
)
def test_each_field_of_a_run_is_read_outside_of_the_configuration(config):
    assert _fields(config) - _attributes_read() == set()
