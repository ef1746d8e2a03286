r"""Llama 2-Chat 13B of Llama 2 13B, as in the paper's section 3.

    llama-jax data dialogs --train DIALOGS.jsonl --validation HELD_OUT.jsonl \
        --tokenizer tokenizer.model --output data/sft
    llama-jax train configs/chat/llama2_13b.py:sft --init-from LLAMA2_13B \
        --workdir gs://BUCKET/13b-sft
    llama-jax data comparisons --train PAIRS.jsonl --validation HELD_OUT.jsonl \
        --tokenizer tokenizer.model --output data/helpfulness
    (and so data/helpfulness-others, data/safety and data/safety-others)
    llama-jax train configs/chat/llama2_13b.py:helpfulness \
        --init-from gs://BUCKET/13b-sft --workdir gs://BUCKET/13b-helpfulness
    llama-jax train configs/chat/llama2_13b.py:safety \
        --init-from gs://BUCKET/13b-sft --workdir gs://BUCKET/13b-safety
    llama-jax data prompts --train PROMPTS.jsonl --validation HELD_OUT.jsonl \
        --tokenizer tokenizer.model --output data/prompts
    llama-jax train configs/chat/llama2_13b.py:ppo --init-from gs://BUCKET/13b-sft \
        --ppo.helpfulness gs://BUCKET/13b-helpfulness \
        --ppo.safety gs://BUCKET/13b-safety --workdir gs://BUCKET/13b-ppo

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
    """v5e-64: 64 chips, one row on each."""
    return paper_sft(
        LlamaConfig.llama2_13b(),
        topology="v5e:8x8",
        mesh=MeshConfig(fsdp=64),
        remat="full",
    )


def helpfulness() -> RewardRecipe:
    """v5e-64: 64 chips, three rows on each, one after the other."""
    return paper_reward(
        LlamaConfig.llama2_13b(),
        about="helpfulness",
        peak_lr=1e-5,
        topology="v5e:8x8",
        mesh=MeshConfig(fsdp=64),
        remat="full",
    )


def safety() -> RewardRecipe:
    """As `helpfulness`."""
    return paper_reward(
        LlamaConfig.llama2_13b(),
        about="safety",
        peak_lr=1e-5,
        topology="v5e:8x8",
        mesh=MeshConfig(fsdp=64),
        remat="full",
    )


def ppo() -> PpoRecipe:
    """v5e-64: 64 chips; 8 share a copy of the weights while answers are written."""
    return paper_ppo(
        LlamaConfig.llama2_13b(),
        beta=0.01,
        topology="v5e:8x8",
        mesh=MeshConfig(fsdp=64),
        remat="full",
        decode_tensor=8,
        decode_batch=128,
    )
