"""Text from a model: choosing a token, the decoding loop, text in and text out."""

from llama_jax.generate.generator import Completion, Generator

__all__ = ["Completion", "Generator"]
