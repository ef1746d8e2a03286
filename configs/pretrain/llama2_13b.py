r"""Pretraining Llama 2 13B as in the paper: 2T tokens, peak learning rate 3e-4.

    llama-jax train configs/pretrain/llama2_13b.py:v5p_128 --workdir gs://BUCKET/13b \
        --data.paths PREPARED

A recipe is named after the slice it is for. Prepare the data first: `llama-jax data
prepare --help`.
"""

from llama_jax.config import LlamaConfig
from llama_jax.config.recipe import PretrainRecipe, paper_pretraining
from sharding import MeshConfig


def v5p_128() -> PretrainRecipe:
    """v5p-128: 64 chips, each with a part of the state and its own rows."""
    return paper_pretraining(
        LlamaConfig.llama2_13b(),
        peak_lr=3e-4,
        topology="v5p:4x4x4",
        mesh=MeshConfig(fsdp=64),
        accumulate=4,
    )


def v5e_256() -> PretrainRecipe:
    """v5e-256: 256 chips, each with a part of the state and its own rows."""
    return paper_pretraining(
        LlamaConfig.llama2_13b(),
        peak_lr=3e-4,
        topology="v5e:16x16",
        mesh=MeshConfig(fsdp=256),
        accumulate=4,
    )


def v4_1024() -> PretrainRecipe:
    """v4-1024: 512 chips, each with a part of the state and its own rows."""
    return paper_pretraining(
        LlamaConfig.llama2_13b(),
        peak_lr=3e-4,
        topology="v4:8x8x8",
        mesh=MeshConfig(fsdp=512),
        accumulate=1,
    )
