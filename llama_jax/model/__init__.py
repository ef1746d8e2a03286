"""The model: `layers` the arithmetic, `transformer` the modules, `depth` the loop."""

from llama_jax.model.cache import KVCache
from llama_jax.model.count import num_params
from llama_jax.model.heads import ScalarLlama
from llama_jax.model.transformer import Llama, param_axes

__all__ = ["KVCache", "Llama", "ScalarLlama", "num_params", "param_axes"]
