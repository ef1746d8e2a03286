"""Checkpoints of other programs: read into this project's parameters, and written."""

from llama_jax.conversion.converter import Conversion, convert
from llama_jax.conversion.detect import AnyCheckpoint, open_any, open_checkpoint

__all__ = ["AnyCheckpoint", "Conversion", "convert", "open_any", "open_checkpoint"]
