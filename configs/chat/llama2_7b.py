r"""Llama 2-Chat 7B of Llama 2 7B, as in the paper's section 3.

    llama-jax data dialogs --train DIALOGS.jsonl --validation HELD_OUT.jsonl \
        --tokenizer tokenizer.model --output data/sft
    llama-jax train configs/chat/llama2_7b.py:sft --init-from LLAMA2_7B \
        --workdir gs://BUCKET/7b-sft

docs/chat.md says what each stage needs.
"""

from llama_jax.config import LlamaConfig
from llama_jax.config.recipe import SftRecipe, paper_sft
from sharding import MeshConfig


def sft() -> SftRecipe:
    """v5e-64: 64 chips, one row on each."""
    return paper_sft(
        LlamaConfig.llama2_7b(),
        topology="v5e:8x8",
        mesh=MeshConfig(fsdp=64),
        remat="projections",
    )
