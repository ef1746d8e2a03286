r"""Pretraining Llama 2 13B as in the paper: 2T tokens, peak learning rate 3e-4.

    llama-jax plan configs/pretrain/llama2_13b.py:v5p_128
    llama-jax train configs/pretrain/llama2_13b.py:v5p_128 --workdir gs://BUCKET/13b \
        --data.paths PREPARED

A recipe is named after the slice it is for, and after how many of them; what a compile
says of each is in docs/performance.md. Prepare the data first: `llama-jax data prepare
--help`.
"""

from llama_jax.config import LlamaConfig
from llama_jax.config.recipe import PretrainRecipe, paper_pretraining
from sharding import MeshConfig


def v5p_128() -> PretrainRecipe:
    """v5p-128: 64 chips, 1M tokens a step."""
    return paper_pretraining(
        LlamaConfig.llama2_13b(),
        peak_lr=3e-4,
        topology="v5p:4x4x4",
        mesh=MeshConfig(fsdp=64),
        rows_per_chip=4,
        remat="projections:30,attention_block",
    )


def v5e_256() -> PretrainRecipe:
    """v5e-256: 256 chips, 1M tokens a step."""
    return paper_pretraining(
        LlamaConfig.llama2_13b(),
        peak_lr=3e-4,
        topology="v5e:16x16",
        mesh=MeshConfig(fsdp=256),
        rows_per_chip=1,
        remat="attention_block",
    )


def v4_1024() -> PretrainRecipe:
    """v4-1024: 512 chips, 2M tokens a step."""
    return paper_pretraining(
        LlamaConfig.llama2_13b(),
        peak_lr=3e-4,
        topology="v4:8x8x8",
        mesh=MeshConfig(fsdp=512),
        rows_per_chip=1,
        remat="projections",
    )
