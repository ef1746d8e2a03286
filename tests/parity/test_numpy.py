"""Agreement with the NumPy model, on a checkpoint made in Meta's layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.conversion.meta import read_meta
from llama_jax.model import Llama
from llama_jax.train.losses import next_token_loss
from tests.parity import tolerances
from tests.parity.test_meta import _params
from tests.reference import meta_checkpoint, numpy_llama

TOKENS = np.random.default_rng(1).integers(0, meta_checkpoint.VOCAB_SIZE, (2, 12))


@pytest.mark.parametrize("num_shards", [1, 4])
def test_logits_and_loss_of_a_made_checkpoint(tmp_path, num_shards):
    tensors = meta_checkpoint.random_tensors()
    directory = meta_checkpoint.write_checkpoint(
        tmp_path / "made", meta_checkpoint.split(tensors, num_shards)
    )
    checkpoint = read_meta(directory, max_length=64)
    logits = jax.jit(Llama(checkpoint.config).apply)(
        {"params": _params(checkpoint)}, jnp.asarray(TOKENS)
    )
    params = meta_checkpoint.PARAMS
    np.testing.assert_allclose(
        logits,
        numpy_llama.logits(params, tensors, TOKENS),
        rtol=0,
        atol=tolerances.NUMPY_LOGITS,
    )
    total, count = next_token_loss(
        logits[:, :-1], jnp.asarray(TOKENS[:, 1:]), jnp.ones((2, 11))
    )
    assert float(total / count) == pytest.approx(
        numpy_llama.loss(params, tensors, TOKENS), abs=tolerances.META_LOSS
    )
