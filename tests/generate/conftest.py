"""What XLA compiles while a test runs."""

import jax
import pytest


@pytest.fixture
def compiled():
    """The names of programs, as they are compiled or read from the cache of them."""
    names = []

    def listen(event: str, seconds: float, **said: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(said.get("fun_name", ""))

    jax.monitoring.register_event_duration_secs_listener(listen)
    jax.jit(lambda x: x + 1)(jax.numpy.arange(3))
    assert names, "the event that counts compilations has another name"
    names.clear()
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)
