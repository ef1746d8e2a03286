"""Checkpoints of other programs, read into this project's parameter tree."""

from llama_jax.conversion.meta import MetaCheckpoint, read_meta

__all__ = ["MetaCheckpoint", "read_meta"]
