"""What it costs to lay parameters out for decoding, and what that gains.

    python benchmarks/rollout.py [--dim 512] [--layers 8] [--rows 16] [--tokens 32]

The paper (section 3.2.3) lost a factor of about 20 in generation to weights that lie as
training wants them: split over all devices, and gathered for every token. Here a model
of random parameters lies so on eight simulated CPU devices, and is copied to layouts
for decoding by `finetune.rollout.reshard`. All layouts decode the same prompts
greedily, in turn, and the best round of each counts. The first row is the layout of
training, copied to itself: its weights have the type of the arithmetic already, so that
the layout is all that differs. Seconds of a copy are those of the second one, as the
first compiles.

Devices that are threads of one processor have no links between them: what one gathers
is copied within one memory. So the ratio shows that gathering for every token costs,
and not how much it would over the links of a TPU.
"""

import argparse

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from llama_jax.build import build
from llama_jax.config import LlamaConfig
from llama_jax.config.sampling import Greedy
from llama_jax.finetune.rollout import Resharding, reshard
from llama_jax.generate import Generator, Settings
from sharding import MeshConfig, make_mesh, training_rules

NUM_DEVICES = 8
VOCAB = 8192
PROMPT = 16
CACHE = 256


def config(dim: int, num_layers: int) -> LlamaConfig:
    """A Llama 2 of these sizes."""
    return LlamaConfig(
        vocab_size=VOCAB,
        dim=dim,
        num_layers=num_layers,
        num_heads=8,
        num_kv_heads=8,
        hidden_dim=dim * 8 // 3 // 64 * 64,
        norm_eps=1e-5,
        rope_theta=1e4,
        max_length=1024,
    )


def decode(generator: Generator, prompts: list[list[int]], num_tokens: int) -> float:
    """Seconds for so many tokens to each prompt, none of which ends early."""
    settings = Settings(max_new_tokens=num_tokens, sampler=Greedy())
    completions = generator.generate(prompts, settings)
    assert {len(c.tokens) for c in completions} == {num_tokens}, "a row ended early"
    return completions[0].timing.decode_seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=16, help="prompts at a time")
    parser.add_argument("--tokens", type=int, default=32, help="to write after each")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    training = make_mesh(MeshConfig(fsdp=NUM_DEVICES))
    sharded = build(
        config(options.dim, options.layers),
        training,
        training_rules(sequence_parallel=False),
        dtype="float32",
        remat="none",
    )
    params = sharded.init(seed=0)
    meshes = {"training": training}
    for tensor in (2, 4, 8):
        data = NUM_DEVICES // tensor
        mesh = make_mesh(MeshConfig(data=data, fsdp=1, tensor=tensor))
        meshes[f"data {data}, tensor {tensor}"] = mesh
    costs, generators = dict[str, Resharding](), dict[str, Generator]()
    for name, mesh in meshes.items():
        reshard(sharded, params, mesh, cache_length=CACHE)  # compiles
        engine, costs[name] = reshard(sharded, params, mesh, cache_length=CACHE)
        generators[name] = Generator(engine, None)
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, VOCAB, (options.rows, PROMPT)).tolist()
    best = dict[str, float]()
    for number in range(options.rounds + 1):
        for name, generator in generators.items():
            seconds = decode(generator, prompts, options.tokens)
            if number:  # the first one compiles
                best[name] = min(seconds, best.get(name, seconds))
    num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    table = Table(
        "layout",
        title=f"{num_params / 1e6:.0f} M parameters, float32, {options.rows} rows, "
        f"{NUM_DEVICES} simulated devices, jax {jax.__version__}",
    )
    for heading in ("copy, GB", "seconds", "GB/s", "tokens/s", "of training's"):
        table.add_column(heading, justify="right")
    for name, seconds in best.items():
        cost = costs[name]
        table.add_row(
            name,
            f"{cost.num_bytes / 1e9:.2f}",
            f"{cost.seconds:.2f}",
            f"{cost.num_bytes / cost.seconds / 1e9:.2f}",
            f"{options.rows * options.tokens / seconds:.0f}",
            f"{best['training'] / seconds:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
