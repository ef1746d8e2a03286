"""Text from a model: choosing a token, the decoding loop, text in and text out."""

from llama_jax.generate.completion import Completion, Timing
from llama_jax.generate.engine import Engine
from llama_jax.generate.generator import Generator
from llama_jax.generate.session import Chat
from llama_jax.generate.settings import Settings

__all__ = ["Chat", "Completion", "Engine", "Generator", "Settings", "Timing"]
