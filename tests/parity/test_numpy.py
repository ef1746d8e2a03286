"""Agreement with the NumPy model, on a checkpoint made in Meta's layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.build import build
from llama_jax.conversion.meta import read_meta
from llama_jax.generate.weights import from_params
from llama_jax.model import Llama
from llama_jax.model.decoder import Decoder
from llama_jax.train.losses import next_token_loss
from sharding import MeshConfig, decoding_rules, make_mesh
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


def test_long_rows_as_generation_reads_them(tmp_path):
    """More queries than attend at a time: whole, and in chunks of a cache."""
    tensors = meta_checkpoint.random_tensors()
    directory = meta_checkpoint.write_checkpoint(
        tmp_path / "made", meta_checkpoint.split(tensors, 1)
    )
    checkpoint = read_meta(directory, max_length=600)
    config, mesh = checkpoint.config, make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    sharded = build(config, mesh, decoding_rules(), dtype="float32", remat="none")
    weights = from_params(sharded, _params(checkpoint), int8=False)
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, meta_checkpoint.VOCAB_SIZE, (1, 600), np.int32)
    expected = numpy_llama.logits(meta_checkpoint.PARAMS, tensors, tokens)

    def close(hidden, at):
        np.testing.assert_allclose(
            decoder.unembed(weights, hidden),
            expected[:, at],
            rtol=0,
            atol=tolerances.NUMPY_LOGITS,
        )

    decoder = Decoder(config)
    close(jax.jit(decoder.hidden)(weights, tokens), slice(None))
    cache = decoder.empty_cache(1, 600, jnp.dtype("float32"))
    for at in (slice(0, 300), slice(300, 560), slice(560, 600)):
        hidden, cache = jax.jit(decoder.extend)(
            weights, tokens[:, at], cache, jnp.int32(at.start)
        )
        close(hidden, at)
