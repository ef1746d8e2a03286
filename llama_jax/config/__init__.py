"""Frozen dataclasses that say what to build and run; validated when made."""

from llama_jax.config.model import LlamaConfig

__all__ = ["LlamaConfig"]
