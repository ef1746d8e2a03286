"""Agreement with Meta's own code: logits, loss, hidden states, every gradient.

The answers were computed by Meta's model in float32; weights are read as `load` does.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.conversion.meta import read_meta
from llama_jax.conversion.names import PARAMETERS
from llama_jax.conversion.rope import half_split_order
from llama_jax.conversion.stored import TensorCheckpoint
from llama_jax.model import Llama, layers, mask
from llama_jax.model.transformer import Block, unconstrained
from llama_jax.train.losses import next_token_loss
from tests.parity.tolerances import (
    BFLOAT16_MULTIPLE,
    META_GRADIENT_RELATIVE,
    META_HIDDEN,
    META_LOGITS,
    META_LOSS,
)

CASES = ("s1_mha_mp1_bf16", "s2_gqa_mp2_fp16", "s3_gqa_mp4_bf16_flat")


def _params(checkpoint: TensorCheckpoint):
    """All leaves as a tree, in float32."""
    tree: dict = {}
    for path in checkpoint.shapes:
        *folders, leaf = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = jnp.asarray(checkpoint.read(path).astype(np.float32))
    return tree


def _as_meta(tree, config) -> dict[str, np.ndarray]:
    """Leaves by Meta's names, one matrix [out, in] for each layer, pairs as neighbours.

    Written from the layout that the table describes, not by the converter.
    """
    tensors = {}
    interleaved = np.argsort(half_split_order(config.head_dim))
    for parameter in PARAMETERS:
        leaf = tree
        for key in parameter.path.split("/"):
            leaf = leaf[key]
        leaf = np.asarray(leaf)
        stacked = leaf if parameter.axes.startswith("L") else leaf[None]
        for layer, array in enumerate(stacked):
            name = parameter.meta.name.format(layer=layer)
            if name.endswith(("wq.weight", "wk.weight")):
                array = array[..., interleaved]
            if name.endswith("wo.weight"):
                array = array.reshape(-1, config.dim)
            elif array.ndim == 3:
                array = array.reshape(config.dim, -1)
            by_rows = array.ndim == 2 and name != "tok_embeddings.weight"
            tensors[name] = array.T if by_rows else array
    return tensors


class Case:
    """One checkpoint, Meta's answers to it, and ours."""

    def __init__(self, directory):
        checkpoint = read_meta(directory, max_length=64)
        self.config = checkpoint.config
        self.params = _params(checkpoint)
        with np.load(directory / "reference.npz") as arrays:
            self.arrays = dict(arrays)
        self.facts = json.loads((directory / "reference.json").read_text())
        self.tokens = jnp.asarray(self.arrays["tokens"])

        def loss(params):
            logits = Llama(self.config).apply({"params": params}, self.tokens)
            total, count = next_token_loss(
                logits[:, :-1],
                self.tokens[:, 1:],
                jnp.ones_like(self.tokens[:, 1:], jnp.float32),
            )
            return total / count, logits

        compiled = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (self.loss, self.logits), gradient = compiled(self.params)
        self.gradient = _as_meta(gradient, self.config)


@pytest.fixture(scope="module", params=CASES)
def case(request, reference) -> Case:
    return Case(reference / "oracle" / request.param)


def far(got, expected) -> float:
    """The largest absolute difference."""
    return float(np.abs(np.asarray(got, np.float64) - expected).max())


def test_logits(case, agree):
    agree("logits", far(case.logits, case.arrays["logits"]), within=META_LOGITS)


def test_log_probabilities_and_loss(case, agree):
    predicted = jax.nn.log_softmax(case.logits[:, :-1])
    chosen = jnp.take_along_axis(predicted, case.tokens[:, 1:, None], axis=-1)[..., 0]
    given = case.arrays["token_logprobs"]
    agree("token logprobs", far(chosen, given), within=META_LOGITS)
    agree("loss", far(case.loss, case.arrays["loss"]), within=META_LOSS)


def test_the_norm_of_every_gradient(case, agree):
    expected = case.facts["grad_norms"]
    assert case.gradient.keys() == expected.keys()
    norms = {
        name: float(np.linalg.norm(gradient.astype(np.float64)))
        for name, gradient in case.gradient.items()
    }
    for name, norm in norms.items():
        difference = abs(norm / expected[name] - 1)
        agree("gradient norms, relative", difference, within=META_GRADIENT_RELATIVE)
    total = np.linalg.norm(list(norms.values())) / case.facts["grad_norm_total"]
    agree(
        "whole gradient's norm, relative", abs(total - 1), within=META_GRADIENT_RELATIVE
    )


def test_gradients_value_by_value(case, agree):
    names = [name for name in case.arrays if name.startswith("grad/")]
    assert len(names) == 5
    for name in names:
        expected = case.arrays[name]
        off = far(case.gradient[name.removeprefix("grad/")], expected)
        agree(
            "gradients, relative to the largest",
            off / np.abs(expected).max(),
            within=META_GRADIENT_RELATIVE,
        )


def test_hidden_states_after_each_block(case, agree):
    """Block by block in a Python loop, with the scan's parameters unstacked."""
    config, expected = case.config, case.arrays["hidden_states"]
    positions = jnp.arange(case.tokens.shape[1])[None]
    angle = layers.rotary_angles(
        positions, head_dim=config.head_dim, theta=config.rope_theta
    )
    pattern = mask.causal(case.tokens.shape[1])
    block = Block(config, unconstrained, layers.attend)
    run = jax.jit(lambda params, x: block.apply({"params": params}, x, angle, pattern))
    x = case.params["embed"]["table"][case.tokens]
    assert len(expected) == config.num_layers + 1
    np.testing.assert_array_equal(x, expected[0])
    for layer in range(config.num_layers):
        x = run(jax.tree.map(lambda p, i=layer: p[i], case.params["blocks"]), x)
        agree("hidden states", far(x, expected[layer + 1]), within=META_HIDDEN)


def test_bfloat16_is_no_further_off_than_metas(case):
    model = Llama(case.config, dtype=jnp.dtype("bfloat16"))
    got = jax.jit(model.apply)({"params": case.params}, case.tokens)
    metas = np.abs(case.arrays["logits_bf16_compute"] - case.arrays["logits"])
    ours = np.abs(np.asarray(got) - case.arrays["logits"])
    assert got.dtype == jnp.float32
    assert 0 < ours.max() < BFLOAT16_MULTIPLE * metas.max()
    assert ours.mean() < BFLOAT16_MULTIPLE * metas.mean()
