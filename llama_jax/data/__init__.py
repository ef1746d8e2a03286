"""Texts to batches: tokenised and packed once, read as often as needed.

    sources  ->  prepare  ->  dataset.json and ArrayRecord files  ->  pipeline

Corpora that this project wraps for tensorflow-datasets are in `data.builders`.
"""

from llama_jax.data.batch import Batch, ComparisonBatch, Experience, PromptBatch
from llama_jax.data.pipeline import TrainingData, ValidationData, open_data
from llama_jax.data.prepare import (
    prepare,
    prepare_comparisons,
    prepare_dialogs,
    prepare_prompts,
    write_shard,
)
from llama_jax.data.prepared import Prepared
from llama_jax.data.sources import (
    Comparison,
    ComparisonLines,
    Comparisons,
    Dialog,
    DialogLines,
    Dialogs,
    Documents,
    JsonLines,
    Prompt,
    PromptLines,
    Prompts,
    Records,
    TextFiles,
)

__all__ = [
    "Batch",
    "Comparison",
    "ComparisonBatch",
    "ComparisonLines",
    "Comparisons",
    "Dialog",
    "DialogLines",
    "Dialogs",
    "Documents",
    "Experience",
    "JsonLines",
    "Prepared",
    "Prompt",
    "PromptBatch",
    "PromptLines",
    "Prompts",
    "Records",
    "TextFiles",
    "TrainingData",
    "ValidationData",
    "open_data",
    "prepare",
    "prepare_comparisons",
    "prepare_dialogs",
    "prepare_prompts",
    "write_shard",
]
