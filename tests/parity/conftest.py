"""One tiny model, one batch, and what a mesh makes of them."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import optax
import pytest

from llama_jax.build import ShardedLlama, build
from llama_jax.config import LlamaConfig
from llama_jax.config.train import OptimizerConfig
from llama_jax.data.batch import Batch
from llama_jax.model import layers
from llama_jax.model.ring import GatheredAttention, RingAttention
from llama_jax.train.optimizer import make_optimizer, make_schedule
from llama_jax.train.state import TrainState, fresh_state
from llama_jax.train.step import make_train_step
from sharding import MeshConfig, make_mesh, training_rules
from tests.parity import tolerances

CONFIG = LlamaConfig.tiny()
NUM_STEPS = 3
# Warm from the start, and so small a clip that it acts; high rates show differences.
OPTIMIZER = OptimizerConfig(
    peak_lr=1e-2,
    final_lr_fraction=0.1,
    warmup_steps=1,
    beta1=0.9,
    beta2=0.95,
    eps=1e-5,
    weight_decay=0.1,
    clip_norm=1.0,
)


# Attention across the axis `context`, by name; tiles small enough to be several.
CROSSING = {
    "ring": functools.partial(RingAttention, tile=1),
    "gathered": GatheredAttention,
}


def place(
    mesh: MeshConfig,
    *,
    num_devices: int,
    sequence_parallel: bool = False,
    crossing: str = "",
    config: LlamaConfig = CONFIG,
):
    """The tiny model on a mesh of some of the devices."""
    devices = make_mesh(mesh, jax.devices()[:num_devices])
    rules = training_rules(sequence_parallel=sequence_parallel)
    attend = layers.attend
    if crossing:
        attend = CROSSING[crossing](mesh=devices, rules=rules)
    return build(config, devices, rules, dtype="float32", remat="none", attend=attend)


def make_batch(seed: int, *, rows: int = 8, length: int = 16) -> Batch:
    """Random tokens, two documents a row; odd rows have few targets that count."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, CONFIG.vocab_size, (rows, length + 1), dtype=np.int32)
    weights = (rng.random((rows, length)) < 0.8).astype(np.float32)
    weights[1::2, 4:] = 0
    segments = np.zeros((rows, length), np.int32)
    segments[:, length // 3 :] = 1
    return Batch(
        tokens=tokens[:, :-1], targets=tokens[:, 1:], weights=weights, segments=segments
    )


@dataclasses.dataclass
class Trained:
    """What three steps show; everything on the host."""

    losses: list[float]
    norms: list[float]
    gradient: Any
    params: Any


def train(sharded: ShardedLlama, state: TrainState, *, accumulate: int) -> Trained:
    """Three steps on three batches."""
    optimizer = make_optimizer(OPTIMIZER, NUM_STEPS)
    step = make_train_step(
        sharded,
        optimizer,
        make_schedule(OPTIMIZER, NUM_STEPS),
        accumulate=accumulate,
        spike_norm=None,
    )
    losses, norms, gradient = [], [], None
    with jax.set_mesh(sharded.mesh):
        for number in range(NUM_STEPS):
            state, measured = step(state, make_batch(number))
            assert bool(measured.applied)
            losses.append(float(measured.loss))
            norms.append(float(measured.grad_norm))
            if number == 0:
                # After one step Adam's mean is the clipped gradient times 1 - β1.
                mean = optax.tree_utils.tree_get(state.opt_state, "mu")
                scale = max(1.0, norms[0] / OPTIMIZER.clip_norm)
                gradient = jax.tree.map(
                    lambda m, s=scale: np.asarray(m) * s / (1 - OPTIMIZER.beta1), mean
                )
    return Trained(losses, norms, gradient, jax.device_get(state.params))


def start(sharded: ShardedLlama, params) -> TrainState:
    """Step 0 on this mesh, with a copy of these parameters."""
    return fresh_state(
        sharded,
        make_optimizer(OPTIMIZER, NUM_STEPS),
        jax.device_put(params, sharded.param_shardings, may_alias=False),
    )


def logits_of(sharded: ShardedLlama, params) -> np.ndarray:
    """Logits of the first batch, computed on the mesh."""
    batch = make_batch(0)
    with jax.set_mesh(sharded.mesh):
        forward = jax.jit(sharded.model.apply)
        placed = jax.device_put(params, sharded.param_shardings)
        return np.asarray(forward({"params": placed}, batch.tokens, batch.segments))


def require_close(got, expected, *, relative: float) -> None:
    """Each leaf within `relative` of the expected leaf's largest value."""
    for (path, a), (_, b) in zip(
        jax.tree.leaves_with_path(got),
        jax.tree.leaves_with_path(expected),
        strict=True,
    ):
        np.testing.assert_allclose(
            a,
            b,
            rtol=0,
            atol=relative * np.abs(b).max(),
            err_msg=jax.tree_util.keystr(path),
        )


def require_same(trained: Trained, alone: Trained) -> None:
    """Losses, gradient and parameters, but for the order of the sums."""
    np.testing.assert_allclose(
        trained.losses, alone.losses, rtol=0, atol=tolerances.ORDER_LOSS
    )
    require_close(
        trained.gradient,
        alone.gradient,
        relative=tolerances.ORDER_GRADIENT_RELATIVE,
    )
    require_close(
        trained.params, alone.params, relative=tolerances.ORDER_PARAMS_RELATIVE
    )


@pytest.fixture(scope="session")
def one_device() -> ShardedLlama:
    """The tiny model on one device."""
    return place(MeshConfig(), num_devices=1)


@pytest.fixture(scope="session")
def params(one_device):
    """Initial parameters, on the host; large matrices, so that attention is sharp."""
    return jax.tree.map_with_path(
        lambda path, leaf: np.asarray(leaf) * (1 if path[-1].key == "scale" else 3),
        one_device.init(seed=0),
    )


@pytest.fixture(scope="session")
def alone(one_device, params) -> Trained:
    """Three steps on one device."""
    return train(one_device, start(one_device, params), accumulate=1)
