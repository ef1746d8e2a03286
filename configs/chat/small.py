"""The stages of a chat model for two CPU cores, in a small world whose truth is a rule.

`scripts/chat.sh --tiny` runs them one after the other and measures the result;
scripts/small_world.py says what the world is. Three layers and a million parameters;
learning rates are higher than the paper's and runs shorter, as small models want it.
"""

import dataclasses

from llama_jax.config import LlamaConfig
from llama_jax.config.data import DataConfig
from llama_jax.config.finetune import Judged, PpoConfig, RewardConfig
from llama_jax.config.recipe import (
    PpoRecipe,
    PretrainRecipe,
    RewardRecipe,
    SftRecipe,
    paper_optimizer,
)
from llama_jax.config.train import TrainConfig
from sharding import MeshConfig

RUN = "runs/chat/seed-0"
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
    return _pretraining(length=256, num_steps=500, batch_size=16, peak_lr=3e-3)


def base_long() -> PretrainRecipe:
    """Goes on from `base` in rows of 512: as long as dialogs of twenty turns."""
    return _pretraining(length=512, num_steps=240, batch_size=8, peak_lr=1e-3)


def sft() -> SftRecipe:
    """Dialogs, from `base_long`: every version is trained so, each on its own data.

    scripts/chat.sh trains those with rows of Ghost Attention for 510 steps.
    """
    return SftRecipe(
        model=MODEL,
        data=_data("sft", length=512),
        optimizer=paper_optimizer(peak_lr=1.5e-3, warmup_steps=20),
        train=_train(num_steps=340, batch_size=8),
        mesh=MeshConfig(),
        sequence_parallel=False,
        topology="",
        epochs=None,
    )


def helpfulness() -> RewardRecipe:
    """From `sft`: the more helpful of two answers."""
    return _rewarding("helpfulness", num_steps=340)


def safety() -> RewardRecipe:
    """From `sft`: the safer of two answers, and which are safe."""
    return _rewarding("safety", num_steps=70)


def ppo() -> PpoRecipe:
    """From the last version: 25 iterations of 96 prompts."""
    return PpoRecipe(
        model=MODEL,
        data=DataConfig(paths=(f"{RUN}/rows/prompts",), sequence_length=128, seed=0),
        optimizer=dataclasses.replace(
            paper_optimizer(peak_lr=1e-4, warmup_steps=0), final_lr_fraction=1.0
        ),
        train=_train(num_steps=75, batch_size=32),
        mesh=MeshConfig(),
        sequence_parallel=False,
        topology="",
        ppo=PpoConfig(
            helpfulness=f"{RUN}/helpfulness",
            safety=f"{RUN}/safety",
            critic="helpfulness",
            threshold=0.15,
            beta=0.1,
            prompts=96,
            max_new_tokens=24,
            temperature=1.0,
            clip=0.2,
            value_clip=0.2,
            gamma=1.0,
            lam=0.95,
            patience=None,
            decode_tensor=1,
            decode_batch=96,
        ),
    )


def _pretraining(
    *, length: int, num_steps: int, batch_size: int, peak_lr: float
) -> PretrainRecipe:
    return PretrainRecipe(
        model=MODEL,
        data=_data(f"documents-{length}", length=length),
        optimizer=paper_optimizer(peak_lr=peak_lr, warmup_steps=20),
        train=_train(num_steps, batch_size),
        mesh=MeshConfig(),
        sequence_parallel=False,
        topology="",
    )


def _rewarding(about: Judged, *, num_steps: int) -> RewardRecipe:
    return RewardRecipe(
        model=MODEL,
        data=_data(about, length=512),
        optimizer=paper_optimizer(peak_lr=7e-4, warmup_steps=10),
        train=_train(num_steps, batch_size=8),
        mesh=MeshConfig(),
        sequence_parallel=False,
        topology="",
        epochs=None,
        reward=RewardConfig(
            margin="small", safety_weight=1.0 if about == "safety" else 0.0
        ),
    )


def _data(name: str, *, length: int) -> DataConfig:
    return DataConfig(
        paths=(f"{RUN}/rows/{name}",), sequence_length=length, seed=0, segments=True
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
