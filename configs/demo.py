"""A Llama 2 for two CPU cores: the paper's recipe scaled down to some minutes.

    llama-jax train configs/demo.py:small --workdir runs/demo

`make demo` runs it from beginning to end. Grouped-query heads as in the 34B and 70B;
the learning rate is higher, the warm-up shorter and the batch far smaller, as small
models and short runs want it.
"""

from llama_jax.config import LlamaConfig
from llama_jax.config.data import DataConfig
from llama_jax.config.recipe import PretrainRecipe, paper_optimizer
from llama_jax.config.train import TrainConfig
from sharding import MeshConfig


def small() -> PretrainRecipe:
    """About 4 million parameters, 2,048 pieces, 1,024 tokens a step."""
    sequence_length = 128
    return PretrainRecipe(
        model=LlamaConfig(
            vocab_size=2048,
            dim=256,
            num_layers=4,
            num_heads=4,
            num_kv_heads=2,
            hidden_dim=688,
            norm_eps=1e-5,
            rope_theta=1e4,
            max_length=512,
        ),
        data=DataConfig(
            paths=("runs/demo/data",), sequence_length=sequence_length, seed=0
        ),
        optimizer=paper_optimizer(peak_lr=1e-3, warmup_steps=150),
        train=TrainConfig(
            num_steps=1750,
            batch_size=8,
            accumulate=1,
            compute_dtype="float32",
            remat="none",
            seed=0,
            validate_every=350,
            checkpoint_every=125,
            keep_latest=2,
            keep_period=0,
            on_bad_step="stop",
        ),
        mesh=MeshConfig(),
        sequence_parallel=False,
        topology="",
    )
