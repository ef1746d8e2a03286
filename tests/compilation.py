"""Programs that must not come from the cache of compiled ones."""

import contextlib
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache import compilation_cache


@contextlib.contextmanager
def compiled_anew() -> Iterator[None]:
    """Neither read compiled programs from disk nor keep them.

    In a program for several CPU devices that XLA reads back from disk, collectives of
    a `shard_map` that do not depend on one another may run in any order, and as all
    have one channel they take each other's data: wrong values, an abort or a hang
    (jaxlib 0.10.2). As compiled, they run in order.
    """
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", enabled)
    compilation_cache.reset_cache()
