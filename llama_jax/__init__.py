"""Llama 2 (arXiv 2307.09288) in JAX and Flax, for TPU pods.

Importing this package imports nothing heavy: names and submodules load when used.
"""

import difflib
import importlib
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama_jax.config.sampling import Greedy, MinP, Penalties, TopK, TopP
    from llama_jax.conversion.converter import convert
    from llama_jax.llm import load
    from llama_jax.planning.plan import plan
    from llama_jax.text.tokenizer import Tokenizer

__version__ = "0.1.0"

__all__ = [
    "Greedy",
    "MinP",
    "Penalties",
    "Tokenizer",
    "TopK",
    "TopP",
    "convert",
    "load",
    "plan",
]

# The module that each name of the public surface comes from.
_HOMES = {
    "Greedy": "llama_jax.config.sampling",
    "MinP": "llama_jax.config.sampling",
    "Penalties": "llama_jax.config.sampling",
    "Tokenizer": "llama_jax.text.tokenizer",
    "TopK": "llama_jax.config.sampling",
    "TopP": "llama_jax.config.sampling",
    "convert": "llama_jax.conversion.converter",
    "load": "llama_jax.llm",
    "plan": "llama_jax.planning.plan",
}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _submodules():
        return importlib.import_module(f"{__name__}.{name}")
    near = difflib.get_close_matches(name, __dir__(), n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}.{hint}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_submodules()})


def _submodules() -> set[str]:
    return {module.name for module in pkgutil.iter_modules(__path__)}
