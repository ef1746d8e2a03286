"""A small model with a tokenizer, random but sure of itself, on any mesh.

Compiling is what costs: tests keep to four rows and to few lengths of the context, so
that most of them find their programs compiled.
"""

import dataclasses
import functools
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest

from llama_jax.build import ShardedLlama, build
from llama_jax.config import LlamaConfig
from llama_jax.generate import Engine, Generator
from llama_jax.generate.weights import from_params
from llama_jax.llm import LLM
from llama_jax.model.count import abstract_params
from llama_jax.model.decoder import Weights
from llama_jax.text import Tokenizer, train_tokenizer
from sharding import MeshConfig, decoding_rules, make_mesh

CONFIG = dataclasses.replace(LlamaConfig.tiny(), vocab_size=384, max_length=32)
# With room for several chunks, and for a conversation.
LONG = dataclasses.replace(CONFIG, max_length=1024)
ONE = MeshConfig(fsdp=1)
EIGHT = MeshConfig(fsdp=2, tensor=4)
# Rows over four devices, in two ways.
ROWS = MeshConfig(data=2, fsdp=2, tensor=2)
# Twice as many devices as key/value heads.
COPIES = MeshConfig(fsdp=1, tensor=8)


def model(
    mesh: MeshConfig = ONE, *, config: LlamaConfig = CONFIG
) -> tuple[ShardedLlama, dict]:
    """The model on a mesh, and its parameters: the same on each."""
    return _model(mesh, config)


@functools.cache
def _model(mesh: MeshConfig, config: LlamaConfig) -> tuple[ShardedLlama, dict]:
    devices = jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor]
    sharded = build(
        config,
        make_mesh(mesh, devices),
        decoding_rules(),
        dtype="float32",
        remat="none",
    )
    return sharded, jax.device_put(params_of(config), sharded.param_shardings)


@functools.cache
def params_of(config: LlamaConfig) -> dict:
    """Parameters, made on the host, where nothing has to be compiled for them."""
    rng = np.random.default_rng(0)

    def values(path, leaf):
        # At their usual scale all tokens are about equally probable. This far from it,
        # the best is clearly so, and attention attends to something.
        if path[-1].key == "scale":
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        return rng.normal(scale=0.15, size=leaf.shape).astype(np.float32)

    return jax.tree.map_with_path(values, abstract_params(config))


def weights(
    mesh: MeshConfig = ONE, *, config: LlamaConfig = CONFIG, int8: bool = False
) -> Weights:
    """The same as generation reads them."""
    return _weights(mesh, config, int8)


@functools.cache
def _weights(mesh: MeshConfig, config: LlamaConfig, int8: bool) -> Weights:
    return from_params(*_model(mesh, config), int8=int8)


def engine(
    mesh: MeshConfig = ONE,
    *,
    config: LlamaConfig = CONFIG,
    int8: bool = False,
    slots: int | None = None,
    cache: str | None = None,
) -> Engine:
    """An engine of its own, which shares the weights with others."""
    return Engine(
        model(mesh, config=config)[0],
        weights(mesh, config=config, int8=int8),
        slots=slots,
        cache_dtype=cache,
    )


def generator(mesh: MeshConfig = ONE, **options) -> Generator:
    """A generator, with the options of `engine`."""
    return Generator(engine(mesh, **options), tokenizer())


def llm(mesh: MeshConfig = ONE, *, speaks: bool = True, **options) -> LLM:
    """What `load` would give, with the options of `engine`."""
    return LLM(engine(mesh, **options), tokenizer() if speaks else None)


def on(*meshes: MeshConfig, slow: Sequence[MeshConfig] = ()) -> pytest.MarkDecorator:
    """A test for each of these meshes, by name."""
    names = {ONE: "one", EIGHT: "eight", ROWS: "rows", COPIES: "copies"}
    cases = [pytest.param(mesh, id=names[mesh]) for mesh in meshes]
    cases += [
        pytest.param(mesh, id=names[mesh], marks=pytest.mark.slow) for mesh in slow
    ]
    return pytest.mark.parametrize("mesh", cases)


@functools.cache
def tokenizer() -> Tokenizer:
    """Trained on invented words; it has as many pieces as the model embeddings."""
    choose = random.Random(0)
    syllables = "ba ce di fo gu han kel mir nos tur wex yal".split()
    words = ["".join(choose.choices(syllables, k=3)) for _ in range(100)]
    documents = [" ".join(choose.choices(words, k=12)) for _ in range(100)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.model"
        return train_tokenizer(documents, path, vocab_size=CONFIG.vocab_size)


def near(found, expected):
    """Equal, but for the last bits of log-probabilities."""
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=0, atol=1e-5)
        assert dataclasses.replace(a, logprobs=b.logprobs) == b
