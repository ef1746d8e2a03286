"""A small model with a tokenizer, random but sure of itself, on any mesh.

Compiling is what costs: tests keep to four rows and to lengths of the same bucket,
so that most of them find their programs compiled.
"""

import dataclasses
import functools
import random
import tempfile
from pathlib import Path

import jax

from llama_jax.build import ShardedLlama, build
from llama_jax.config import LlamaConfig
from llama_jax.text import Tokenizer, train_tokenizer
from sharding import MeshConfig, decoding_rules, make_mesh

CONFIG = dataclasses.replace(LlamaConfig.tiny(), vocab_size=384, max_length=32)
ONE = MeshConfig(fsdp=1)
EIGHT = MeshConfig(fsdp=2, tensor=4)
# Twice as many devices as key/value heads.
COPIES = MeshConfig(fsdp=1, tensor=8)


@functools.cache
def model(mesh: MeshConfig = ONE) -> tuple[ShardedLlama, dict]:
    """The model on a mesh, and its parameters: the same on each."""
    devices = jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor]
    sharded = build(
        CONFIG,
        make_mesh(mesh, devices),
        decoding_rules(),
        dtype="float32",
        remat="none",
    )
    # At their usual scale all tokens are about equally probable. This far from it, the
    # best is clearly so, and attention attends to something.
    params = jax.tree.map(
        lambda x: x * 10 if x.ndim > 2 or x.shape[0] > 2 and x.ndim == 2 else x,
        sharded.init(0),
    )
    return sharded, params


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
