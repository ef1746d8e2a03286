"""The stages of a chat model for two CPU cores, in a small world whose truth is a rule.

`python -m scripts.ghost_attention` runs them one after the other and measures the
result; scripts/small_world.py says what the world is. Three layers and a million
parameters; learning rates are higher than the paper's and runs shorter, as small models
want it.
"""

from llama_jax.config import LlamaConfig
from llama_jax.config.data import DataConfig
from llama_jax.config.recipe import PretrainRecipe, SftRecipe, paper_optimizer
from llama_jax.config.train import TrainConfig
from sharding import MeshConfig

RUN = "runs/ghost"
MODEL = LlamaConfig(
    vocab_size=1024,
    dim=128,
    num_layers=3,
    num_heads=4,
    num_kv_heads=4,
    hidden_dim=344,
    norm_eps=1e-5,
    rope_theta=1e4,
    max_length=768,  # dialogs of twenty turns fit, whatever is answered
)


def base() -> PretrainRecipe:
    """Documents in rows of 256 tokens: most of what is learnt, at little cost."""
    return _pretraining(length=256, num_steps=330, batch_size=16, peak_lr=3e-3)


def base_long() -> PretrainRecipe:
    """Goes on from `base` in rows of 512: as long as dialogs of twenty turns."""
    return _pretraining(length=512, num_steps=60, batch_size=8, peak_lr=1e-3)


def sft() -> SftRecipe:
    """Dialogs of the world's people, from `base_long`."""
    return _tuning(
        ("sft-256",), (1.0,), num_steps=160, batch_size=16, length=256, peak_lr=1.5e-3
    )


def more_sft() -> SftRecipe:
    """As many tokens of dialogs as `ghost` has, from `sft`: what it is compared to."""
    return _tuning(
        ("sft-400",), (1.0,), num_steps=150, batch_size=8, length=400, peak_lr=1e-3
    )


def ghost() -> SftRecipe:
    """Ghost Attention, from `sft`: six rows of it to four of dialogs as before."""
    return _tuning(
        ("ghost", "sft-400"),
        (0.6, 0.4),
        num_steps=150,
        batch_size=8,
        length=400,
        peak_lr=1e-3,
    )


def _pretraining(
    *, length: int, num_steps: int, batch_size: int, peak_lr: float
) -> PretrainRecipe:
    return PretrainRecipe(
        model=MODEL,
        data=DataConfig(
            paths=(f"{RUN}/documents-{length}",),
            sequence_length=length,
            seed=0,
            segments=True,
        ),
        optimizer=paper_optimizer(peak_lr=peak_lr, warmup_steps=20),
        train=_train(num_steps, batch_size),
        mesh=MeshConfig(),
        sequence_parallel=False,
        topology="",
    )


def _tuning(
    names: tuple[str, ...],
    weights: tuple[float, ...],
    *,
    num_steps: int,
    batch_size: int,
    length: int,
    peak_lr: float,
) -> SftRecipe:
    return SftRecipe(
        model=MODEL,
        data=DataConfig(
            paths=tuple(f"{RUN}/{name}" for name in names),
            weights=weights,
            sequence_length=length,
            seed=0,
            segments=True,
        ),
        optimizer=paper_optimizer(peak_lr=peak_lr, warmup_steps=20),
        train=_train(num_steps, batch_size),
        mesh=MeshConfig(),
        sequence_parallel=False,
        topology="",
        epochs=None,
    )


def _train(num_steps: int, batch_size: int) -> TrainConfig:
    return TrainConfig(
        num_steps=num_steps,
        batch_size=batch_size,
        accumulate=1,
        compute_dtype="float32",
        remat="none",
        seed=0,
        validate_every=80,
        checkpoint_every=40,
        keep_latest=1,
        keep_period=0,
        on_bad_step="stop",
    )
