r"""Pretraining Llama 2 34B as in the paper: 2T tokens, peak learning rate 1.5e-4.

    llama-jax plan configs/pretrain/llama2_34b.py:v5p_256
    llama-jax train configs/pretrain/llama2_34b.py:v5p_256 --workdir gs://BUCKET/34b \
        --data.paths PREPARED

A recipe is named after the slice it is for, and after how many of them; what a compile
says of each is in docs/performance.md. Prepare the data first: `llama-jax data prepare
--help`.
"""

from llama_jax.config import LlamaConfig
from llama_jax.config.recipe import PretrainRecipe, paper_pretraining
from sharding import MeshConfig


def v5p_256() -> PretrainRecipe:
    """v5p-256: 128 chips, 1M tokens a step."""
    return paper_pretraining(
        LlamaConfig.llama2_34b(),
        peak_lr=1.5e-4,
        topology="v5p:4x4x8",
        mesh=MeshConfig(fsdp=128),
        rows_per_chip=2,
        remat="projections",
    )


def v5e_256() -> PretrainRecipe:
    """v5e-256: 256 chips, 1M tokens a step."""
    return paper_pretraining(
        LlamaConfig.llama2_34b(),
        peak_lr=1.5e-4,
        topology="v5e:16x16",
        mesh=MeshConfig(fsdp=256),
        rows_per_chip=1,
        remat="attention",
    )


def v4_1024() -> PretrainRecipe:
    """v4-1024: 512 chips, 2M tokens a step."""
    return paper_pretraining(
        LlamaConfig.llama2_34b(),
        peak_lr=1.5e-4,
        topology="v4:8x8x8",
        mesh=MeshConfig(fsdp=512),
        rows_per_chip=1,
        remat="attention_block",
    )
