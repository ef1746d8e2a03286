r"""Llama 2-Chat 70B of Llama 2 70B, as in the paper's section 3.

    llama-jax data dialogs --train DIALOGS.jsonl --validation HELD_OUT.jsonl \
        --tokenizer tokenizer.model --output data/sft
    llama-jax train configs/chat/llama2_70b.py:sft --init-from LLAMA2_70B \
        --workdir gs://BUCKET/70b-sft
    llama-jax data comparisons --train PAIRS.jsonl --validation HELD_OUT.jsonl \
        --tokenizer tokenizer.model --output data/helpfulness
    (and so data/helpfulness-others, data/safety and data/safety-others)
    llama-jax train configs/chat/llama2_70b.py:helpfulness \
        --init-from gs://BUCKET/70b-sft --workdir gs://BUCKET/70b-helpfulness
    llama-jax train configs/chat/llama2_70b.py:safety \
        --init-from gs://BUCKET/70b-sft --workdir gs://BUCKET/70b-safety
    llama-jax data prompts --train PROMPTS.jsonl --validation HELD_OUT.jsonl \
        --tokenizer tokenizer.model --output data/prompts
    llama-jax train configs/chat/llama2_70b.py:ppo --init-from gs://BUCKET/70b-sft \
        --ppo.helpfulness gs://BUCKET/70b-helpfulness \
        --ppo.safety gs://BUCKET/70b-safety --workdir gs://BUCKET/70b-ppo

docs/chat.md says what each stage needs.
"""

from llama_jax.config import LlamaConfig
from llama_jax.config.recipe import (
    PpoRecipe,
    RewardRecipe,
    SftRecipe,
    paper_ppo,
    paper_reward,
    paper_sft,
)
from sharding import MeshConfig


def sft() -> SftRecipe:
    """v5p-128: 64 chips, one row on each."""
    return paper_sft(
        LlamaConfig.llama2_70b(),
        topology="v5p:4x4x4",
        mesh=MeshConfig(fsdp=64),
        remat="projections",
    )


def helpfulness() -> RewardRecipe:
    """v5p-128: 64 chips, three rows on each, one after the other."""
    return paper_reward(
        LlamaConfig.llama2_70b(),
        about="helpfulness",
        peak_lr=5e-6,
        topology="v5p:4x4x4",
        mesh=MeshConfig(fsdp=64),
        remat="projections",
    )


def safety() -> RewardRecipe:
    """As `helpfulness`."""
    return paper_reward(
        LlamaConfig.llama2_70b(),
        about="safety",
        peak_lr=5e-6,
        topology="v5p:4x4x4",
        mesh=MeshConfig(fsdp=64),
        remat="projections",
    )


def ppo() -> PpoRecipe:
    """v5p-128: 64 chips; 8 share a copy of the weights while answers are written."""
    return paper_ppo(
        LlamaConfig.llama2_70b(),
        beta=0.005,
        topology="v5p:4x4x4",
        mesh=MeshConfig(fsdp=64),
        remat="projections",
        decode_tensor=8,
        decode_batch=512,
    )
