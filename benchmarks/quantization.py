"""What eight bits cost: the loss of a model on a text, in each form.

    python benchmarks/quantization.py CHECKPOINT TEXT [--length 512]

Rows of the text are read through the cache in chunks, as prompts are, so that what the
cache rounds counts too. Prints nats per token, and the bytes of weights and cache.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from rich.console import Console
from rich.table import Table

import llama_jax
from llama_jax.generate import Engine
from llama_jax.generate.decode import Cache
from llama_jax.model.decoder import Decoder, Weights

# Positions that see what came before them only in the cache's type.
CHUNK = 16
ROWS = 4


@functools.partial(jax.jit, static_argnames="decoder", donate_argnames="cache")
def step(
    decoder: Decoder,
    weights: Weights,
    cache: Cache,
    tokens: jax.Array,
    targets: jax.Array,
    start: jax.Array,
) -> tuple[Cache, jax.Array]:
    """The cache with one chunk more, and the sum of its tokens' cross-entropies."""
    hidden, cache = decoder.extend(weights, tokens, cache, start)
    logprobs = jax.nn.log_softmax(decoder.unembed(weights, hidden))
    chosen = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)
    return cache, -jnp.sum(chosen)


def loss(engine: Engine, rows: np.ndarray) -> float:
    """Nats per token of rows [number, length + 1], several at a time."""
    total, length = 0.0, rows.shape[1] - 1
    for batch in rows.reshape(-1, ROWS, length + 1):
        cache = engine.decoder.empty_cache(ROWS, engine.slots, engine.cache_dtype)
        for start in range(0, length, CHUNK):
            part = slice(start, start + CHUNK)
            cache, nats = step(
                engine.decoder,
                engine.weights,
                cache,
                jnp.asarray(batch[:, :-1][:, part]),
                jnp.asarray(batch[:, 1:][:, part]),
                jnp.int32(start),
            )
            total += float(nats)
    return total / (len(rows) * length)


def num_bytes(tree: object) -> float:
    """Of all arrays, in MB."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) / 1e6


def main() -> None:
    """Measure each form and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("text", type=epath.Path)
    parser.add_argument("--length", type=int, default=512)
    options = parser.parse_args()
    table = Table("weights", "cache", "nats per token", "weights, MB", "cache, MB")
    for weights, cache in ((None, None), ("int8", None), (None, "int8"), ("int8",) * 2):
        llm = llama_jax.load(
            options.checkpoint,
            cache_length=options.length,
            weights=weights,
            cache=cache,
        )
        assert llm.tokenizer is not None, "the checkpoint has no tokenizer"
        ids = llm.tokenizer.encode(options.text.read_text(), bos=True, eos=False)
        width = options.length + 1
        num_rows = len(ids) // width // ROWS * ROWS
        rows = np.array(ids[: num_rows * width], np.int32).reshape(-1, width)
        engine = llm.engine
        empty = engine.decoder.empty_cache(ROWS, engine.slots, engine.cache_dtype)
        with jax.set_mesh(engine.sharded.mesh):
            nats = loss(engine, rows)
        table.add_row(
            str(engine.weights.embed.dtype) if weights is None else weights,
            str(engine.cache_dtype),
            f"{nats:.4f}",
            f"{num_bytes(engine.weights):.1f}",
            f"{num_bytes(empty):.1f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
