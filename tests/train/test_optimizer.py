"""AdamW and its schedule, against the paper's numbers and NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llama_jax.config import LlamaConfig
from llama_jax.config.recipe import paper_optimizer
from llama_jax.errors import ConfigError
from llama_jax.model.count import abstract_params
from llama_jax.train.optimizer import decayed, make_optimizer, make_schedule

PAPER = paper_optimizer(peak_lr=3e-4)
NUM_STEPS = 500_000


def test_the_paper():
    assert dataclasses.asdict(PAPER) == {
        "peak_lr": 3e-4,
        "final_lr_fraction": 0.1,
        "warmup_steps": 2000,
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 1e-5,
        "weight_decay": 0.1,
        "clip_norm": 1.0,
        "moments": "float32",
        "warmup_fraction": 0.0,
    }


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 0.0),
        (1, 3e-4 / 2000),
        (1000, 1.5e-4),
        (2000, 3e-4),
        # Half way down the cosine: the mean of the peak and a tenth of it.
        (251_000, 1.65e-4),
        # A quarter: 0.1 + 0.9 (1 + cos(π / 4)) / 2 of the peak.
        (126_500, 3e-4 * (0.1 + 0.45 * (1 + np.sqrt(0.5)))),
        (500_000, 3e-5),
        (600_000, 3e-5),
    ],
)
def test_the_schedule(step, rate):
    assert float(make_schedule(PAPER, NUM_STEPS)(step)) == pytest.approx(
        rate, rel=1e-5, abs=1e-12
    )


def test_without_warm_up_the_first_step_is_at_the_peak():
    config = dataclasses.replace(PAPER, warmup_steps=0)
    assert float(make_schedule(config, 10)(0)) == pytest.approx(3e-4)


def test_a_run_that_ends_within_the_warm_up():
    schedule = make_schedule(PAPER, 100)
    assert float(schedule(50)) == pytest.approx(50 * 3e-4 / 2000)


def _numpy_adamw(config, num_steps, params, gradients):
    """Algorithm 2 of arXiv 1711.05101, with the global norm of gradients clipped."""
    mean = {name: np.zeros_like(p) for name, p in params.items()}
    square = {name: np.zeros_like(p) for name, p in params.items()}
    params = {name: p.copy() for name, p in params.items()}
    schedule = make_schedule(config, num_steps)
    for t, gradient in enumerate(gradients, 1):
        norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
        for name, p in params.items():
            g = gradient[name] * min(1, config.clip_norm / norm)
            mean[name] = config.beta1 * mean[name] + (1 - config.beta1) * g
            square[name] = config.beta2 * square[name] + (1 - config.beta2) * g**2
            step = mean[name] / (1 - config.beta1**t)
            step /= np.sqrt(square[name] / (1 - config.beta2**t)) + config.eps
            if name != "scale":
                step += config.weight_decay * p
            params[name] = p - float(schedule(t - 1)) * step
    return params


@pytest.mark.parametrize("size", [0.01, 100.0], ids=["unclipped", "clipped"])
def test_three_steps_are_those_of_numpy(size):
    config = dataclasses.replace(PAPER, peak_lr=0.1, warmup_steps=1)
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(3, 4)), "scale": rng.normal(size=4)}
    gradients = [
        {name: size * rng.normal(size=p.shape) for name, p in params.items()}
        for _ in range(3)
    ]
    optimizer = make_optimizer(config, 10)
    update = jax.jit(optimizer.update)
    got = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
    state = optimizer.init(got)
    for gradient in gradients:
        updates, state = update(gradient, state, got)
        got = optax.apply_updates(got, updates)
    expected = _numpy_adamw(config, 10, params, gradients)
    for name in params:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-5, atol=1e-6)
        assert np.abs(expected[name] - params[name]).max() > 0.05


@pytest.mark.parametrize(("num_steps", "warmup"), [(1000, 30), (100, 5), (6, 5)])
def test_the_warm_up_is_a_share_of_the_steps_or_more(num_steps, warmup):
    """Of reward models: 3 % of the steps, at least five (section 3.2.2)."""
    config = dataclasses.replace(PAPER, warmup_steps=5, warmup_fraction=0.03)
    rates = [float(make_schedule(config, num_steps)(step)) for step in range(num_steps)]
    assert rates.index(max(rates)) == warmup
    assert max(rates) == pytest.approx(config.peak_lr)


def test_weight_decay_is_for_matrices_not_for_norms():
    marks = decayed(abstract_params(LlamaConfig.tiny()))
    spared = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, mark in jax.tree.leaves_with_path(marks)
        if not mark
    }
    assert spared == {
        "blocks/attention_norm/scale",
        "blocks/mlp_norm/scale",
        "final_norm/scale",
    }
    assert len(jax.tree.leaves(marks)) == 12


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peak_lr", 0.0),
        ("eps", -1e-5),
        ("clip_norm", 0.0),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("final_lr_fraction", 1.5),
        ("warmup_steps", -1),
        ("weight_decay", -0.1),
    ],
)
def test_values_out_of_range_are_refused(field, value):
    with pytest.raises(ConfigError, match=f"{field} is {value}: it must be"):
        dataclasses.replace(PAPER, **{field: value})


NARROW = dataclasses.replace(PAPER, moments="bfloat16", peak_lr=0.1, warmup_steps=1)
WIDE = dataclasses.replace(NARROW, moments="float32")


def _moment_bytes(config):
    shapes = jax.eval_shape(
        make_optimizer(config, 10).init, abstract_params(LlamaConfig.tiny())
    )
    leaves = [leaf for leaf in jax.tree.leaves(shapes) if leaf.ndim]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def test_bfloat16_moments_are_half_as_large():
    assert _moment_bytes(WIDE) == 2 * _moment_bytes(NARROW) > 0


def test_only_what_is_kept_is_rounded():
    """The first update is that of float32: nothing was kept before it."""
    params = {"kernel": jnp.array([1.0, -2.0, 3.0])}
    gradient = {"kernel": jnp.array([0.1, 0.3, -0.2])}
    updates, states = {}, {}
    for config in (WIDE, NARROW):
        optimizer = make_optimizer(config, 10)
        state = optimizer.init(params)
        updates[config], states[config] = optimizer.update(gradient, state, params)
    np.testing.assert_array_equal(updates[NARROW]["kernel"], updates[WIDE]["kernel"])
    for moment in ("mu", "nu"):
        kept, exact = (
            optax.tree_utils.tree_get(states[config], moment)["kernel"]
            for config in (NARROW, WIDE)
        )
        np.testing.assert_array_equal(kept, exact.astype(jnp.bfloat16))
        assert np.any(kept.astype(jnp.float32) != exact)


def _trained(config) -> list[float]:
    """Losses of a straight line that is fitted to noisy points."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 8)).astype(np.float32)
    y = x @ rng.normal(size=(8, 4)) + 0.1 * rng.normal(size=(64, 4))
    optimizer = make_optimizer(config, 100)

    def loss(params):
        return jnp.mean(jnp.square(x @ params["kernel"] - y))

    def step(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    params = {"kernel": jnp.zeros((8, 4))}
    run = jax.jit(
        lambda params: jax.lax.scan(step, (params, optimizer.init(params)), None, 100)
    )
    return run(params)[1].tolist()


def test_training_with_bfloat16_moments_stays_near_float32():
    narrow, wide = _trained(NARROW), _trained(WIDE)
    assert wide[-1] < 0.01 * wide[0]
    np.testing.assert_allclose(narrow, wide, atol=0.01 * wide[0])
    assert narrow[-1] < 1.05 * wide[-1]
    assert narrow != wide


def test_other_types_of_moments_are_refused():
    with pytest.raises(ConfigError, match="moments is 'float16': .* float32, bfloat16"):
        dataclasses.replace(PAPER, moments="float16")
