"""What is no sampler is refused, with its value and what would do."""

import dataclasses

import pytest

from llama_jax.config.sampling import Greedy, MinP, TopK, TopP
from llama_jax.errors import ConfigError


@pytest.mark.parametrize("p", [0, 0.0, -0.1, 1.01, float("nan"), "0.9", None, True])
@pytest.mark.parametrize("kind", [TopP, MinP])
def test_a_share_of_probability(kind, p):
    with pytest.raises(ConfigError, match=f"is {p!r}.*above 0 and at most 1"):
        kind(p, temperature=1.0)


@pytest.mark.parametrize("k", [0, -1, 2.0, True, None])
def test_a_number_of_tokens(k):
    with pytest.raises(ConfigError, match=f"is {k!r}.*integer of 1 or more"):
        TopK(k, temperature=1.0)


@pytest.mark.parametrize("temperature", [-0.1, float("inf"), float("nan"), "1", True])
@pytest.mark.parametrize("kind", [TopK, TopP, MinP])
def test_a_temperature(kind, temperature):
    with pytest.raises(ValueError, match="temperature is .*above 0, or 0 to"):
        kind(1, temperature=temperature)


def test_the_limits_are_samplers():
    assert TopP(1, temperature=0) == TopP(1.0, temperature=0.0)
    assert MinP(1, temperature=1) != TopP(1, temperature=1)
    assert TopK(1, temperature=1e-9).k == 1


def test_samplers_are_values():
    twice = [Greedy(), Greedy(), TopK(3, temperature=1), TopK(3, temperature=1)]
    assert len(set(twice)) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        TopP(0.9, temperature=1).p = 0.5
