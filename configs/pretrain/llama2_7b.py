r"""Pretraining Llama 2 7B as in the paper: 2T tokens, peak learning rate 3e-4.

    llama-jax plan configs/pretrain/llama2_7b.py:v5p_128
    llama-jax train configs/pretrain/llama2_7b.py:v5p_128 --workdir gs://BUCKET/7b \
        --data.paths PREPARED

A recipe is named after the slice it is for, and after how many of them; what a compile
says of each is in docs/performance.md. Prepare the data first: `llama-jax data prepare
--help`.
"""

import dataclasses

from llama_jax.config import LlamaConfig
from llama_jax.config.recipe import PretrainRecipe, paper_pretraining
from sharding import MeshConfig


def v5p_128() -> PretrainRecipe:
    """v5p-128: 64 chips, 1M tokens a step."""
    return paper_pretraining(
        LlamaConfig.llama2_7b(),
        peak_lr=3e-4,
        topology="v5p:4x4x4",
        mesh=MeshConfig(fsdp=64),
        rows_per_chip=4,
        remat="projections",
    )


def v5p_128x4() -> PretrainRecipe:
    """Four slices of v5p-128: the paper's 4M tokens a step."""
    return paper_pretraining(
        LlamaConfig.llama2_7b(),
        peak_lr=3e-4,
        topology="v5p:4x4x4",
        mesh=MeshConfig(fsdp=64, dcn_data=4),
        rows_per_chip=4,
        remat="projections",
    )


def v5e_256() -> PretrainRecipe:
    """v5e-256: 256 chips, 1M tokens a step."""
    return paper_pretraining(
        LlamaConfig.llama2_7b(),
        peak_lr=3e-4,
        topology="v5e:16x16",
        mesh=MeshConfig(fsdp=256),
        rows_per_chip=1,
        remat="projections",
    )


def v6e_256() -> PretrainRecipe:
    """v6e-256: 256 chips, 2M tokens a step."""
    return paper_pretraining(
        LlamaConfig.llama2_7b(),
        peak_lr=3e-4,
        topology="v6e:16x16",
        mesh=MeshConfig(fsdp=256),
        rows_per_chip=2,
        remat="projections",
    )


def v4_1024() -> PretrainRecipe:
    """v4-1024: 512 chips, 4M tokens a step."""
    return paper_pretraining(
        LlamaConfig.llama2_7b(),
        peak_lr=3e-4,
        topology="v4:8x8x8",
        mesh=MeshConfig(fsdp=512),
        rows_per_chip=2,
        remat="projections",
    )


def v5p_128_32k() -> PretrainRecipe:
    """v5p-128, rows of 32k tokens, four chips to a row, 0.5M tokens a step.

    The paper trains on 4k. The angles are those of Code Llama, which were made for long
    contexts (arXiv 2308.12950, section 2.4). Keys and values are gathered, so that the
    splash kernel does the rest.
    """
    recipe = paper_pretraining(
        dataclasses.replace(LlamaConfig.llama2_7b(), max_length=32_768, rope_theta=1e6),
        peak_lr=3e-4,
        topology="v5p:4x4x4",
        mesh=MeshConfig(fsdp=16, context=4),
        rows_per_chip=1 / 4,
        remat="attention_block",
    )
    train = dataclasses.replace(recipe.train, context_attention="gathered")
    return dataclasses.replace(recipe, train=train)
