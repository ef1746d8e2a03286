"""Training on this machine's cores, side by side with PyTorch + transformers.

    pip install torch transformers
    python benchmarks/train_cpu.py [--peer PYTHON]

A Llama 2 of 134 million parameters, float32, whole steps of AdamW on 4 rows of 512
tokens, the same rows on every side. The sides take turns, each in a process of its own:
this project; transformers' Llama with scaled_dot_product_attention and the fused
AdamW; and that through torch.compile. Prints tokens per second and the peak of
resident memory of each, and what this project is of the faster peer. `--peer` names
the Python that has PyTorch, if it is another one.
"""

import argparse
import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

ROWS, LENGTH, VOCAB = 4, 512, 32000
DIM, LAYERS, HEADS, HIDDEN = 768, 12, 12, 2048
LEARNING_RATE, BETAS, EPS, DECAY, CLIP = 3e-4, (0.9, 0.95), 1e-5, 0.1, 1.0

SIDES = ("llama-jax", "transformers", "transformers, compiled")


def rows() -> np.ndarray:
    """Tokens of one batch, with one more for the last target."""
    return np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH + 1))


def ours() -> Callable[[], float]:
    """One step of this project."""
    import jax
    import jax.numpy as jnp

    from llama_jax.build import build
    from llama_jax.config import LlamaConfig
    from llama_jax.config.train import OptimizerConfig
    from llama_jax.data.batch import Batch
    from llama_jax.train.optimizer import make_optimizer, make_schedule
    from llama_jax.train.state import fresh_state
    from llama_jax.train.step import make_train_step
    from sharding import MeshConfig, make_mesh, training_rules

    config = LlamaConfig(
        vocab_size=VOCAB,
        dim=DIM,
        num_layers=LAYERS,
        num_heads=HEADS,
        num_kv_heads=HEADS,
        hidden_dim=HIDDEN,
        norm_eps=1e-5,
        rope_theta=1e4,
        max_length=LENGTH,
    )
    settings = OptimizerConfig(
        peak_lr=LEARNING_RATE,
        final_lr_fraction=1.0,
        warmup_steps=0,
        beta1=BETAS[0],
        beta2=BETAS[1],
        eps=EPS,
        weight_decay=DECAY,
        clip_norm=CLIP,
    )
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    sharded = build(
        config,
        mesh,
        training_rules(sequence_parallel=False),
        dtype="float32",
        remat="none",
        loss_chunks=8,
    )
    optimizer = make_optimizer(settings, 1)
    # Row by row: what a row needs stays in the cache, and memory is a quarter.
    train_step = make_train_step(
        sharded,
        optimizer,
        make_schedule(settings, 1),
        accumulate=ROWS,
        spike_norm=None,
    )
    state = fresh_state(sharded, optimizer, sharded.init(seed=0))
    tokens = jnp.asarray(rows(), jnp.int32)
    batch = Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        weights=jnp.ones((ROWS, LENGTH), jnp.float32),
        segments=None,
    )

    def step() -> float:
        nonlocal state
        with jax.set_mesh(mesh):
            state, measured = train_step(state, batch)
        return float(measured.loss)

    return step


def transformers(*, compiled: bool) -> Callable[[], float]:
    """One step of the peer."""
    # By name: this project does not depend on them, so no type checker finds them.
    torch = importlib.import_module("torch")
    peer = importlib.import_module("transformers")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    model = peer.LlamaForCausalLM(
        peer.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=DIM,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            intermediate_size=HIDDEN,
            rms_norm_eps=1e-5,
            max_position_embeddings=LENGTH,
            attn_implementation="sdpa",
            use_cache=False,
        )
    )
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=LEARNING_RATE,
        betas=BETAS,
        eps=EPS,
        weight_decay=DECAY,
        fused=True,
    )
    tokens = torch.from_numpy(rows())
    inputs, targets = tokens[:, :-1], tokens[:, 1:].reshape(-1)
    forward = torch.compile(model) if compiled else model

    def step() -> float:
        logits = forward(input_ids=inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.view(-1, VOCAB), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def measure(side: str, steps: int) -> None:
    """In a process of its own: print the seconds of each step, and the peak memory."""
    step = ours() if side == SIDES[0] else transformers(compiled=side == SIDES[2])
    losses, seconds = [step()], list[float]()  # the first compiles
    for _ in range(steps):
        start = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - start)
    assert losses[-1] < losses[0], f"{side} does not learn: {losses}"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak": peak}))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", default=sys.executable)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        return measure(options.side, options.steps)
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    peaks = dict.fromkeys(SIDES, 0)
    for _ in range(options.rounds):
        for side in SIDES:
            python = sys.executable if side == SIDES[0] else options.peer
            command = [python, __file__, "--side", side, "--steps", str(options.steps)]
            run = subprocess.run(command, check=True, stdout=subprocess.PIPE)
            measured = json.loads(run.stdout.splitlines()[-1])
            seconds[side] += measured["seconds"]
            peaks[side] = max(peaks[side], measured["peak"])
    rates = {s: ROWS * LENGTH / statistics.median(seconds[s]) for s in SIDES}
    for side in SIDES:
        print(
            f"{side:24}{rates[side]:7.0f} tokens/s{peaks[side] / 2**30:7.2f} GiB peak"
        )
    peer = max(SIDES[1:], key=rates.__getitem__)
    print(f"{rates[SIDES[0]] / rates[peer]:.2f} x the faster peer ({peer})")


if __name__ == "__main__":
    main()
