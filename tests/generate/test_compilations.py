"""How much is compiled: few programs for any number of requests, none a second time."""

import dataclasses
import math
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from llama_jax.config.sampling import Penalties, TopP
from llama_jax.generate import Generator, Settings
from llama_jax.generate import decode as programs
from tests.generate.models import LONG, generator, llm

WARM = TopP(0.95, temperature=1.5)
# Models of their own, for which no other test has compiled anything.
OWN = dataclasses.replace(LONG, num_layers=1)
SHORT = dataclasses.replace(OWN, max_length=100)


def write(writer: Generator, prompts, *, echo=False, num_samples=1, **options):
    return writer.generate(
        prompts, Settings(**options), echo=echo, num_samples=num_samples
    )


def test_fifty_prompts_of_random_lengths(compiled, monkeypatch):
    """Up to 1024 tokens, one at a time."""
    writer = generator(config=OWN)
    lengths = np.random.default_rng(0).integers(1, OWN.max_length, 50).tolist()
    read, real = [], programs.prefill

    def noted(*args, num_new):
        read.append(num_new)
        return real(*args, num_new=num_new)

    monkeypatch.setattr(programs, "prefill", noted)
    compiled.clear()
    for number, length in enumerate(lengths):
        read.clear()
        sampler = TopP(0.5 + number / 100, temperature=1 + number / 10)
        write(writer, [[1] * length], max_new_tokens=3, sampler=sampler, seed=number)
        assert sum(read) <= max(64, 2 * length)
    counts = Counter(compiled)
    print(f"compiled for 50 prompts: {dict(counts)}")
    prefills = counts["jit(prefill)"]
    assert 0 < prefills <= math.log2(OWN.max_length / 64) + 1
    assert set(counts.values()) == {1, prefills} and counts["jit(decode)"] == 1


@pytest.mark.parametrize(
    "kept",
    [
        {},
        pytest.param({"penalties": Penalties(presence=1.0)}, marks=pytest.mark.slow),
        pytest.param({"allowed": lambda _: [5]}, marks=pytest.mark.slow),
    ],
    ids=["plain", "penalties", "allowed"],
)
def test_new_requests_compile_nothing(compiled, kept):
    writer = generator()

    def requests(rows, **options):
        write(writer, rows, echo=True, **options)
        write(writer, rows[:2], num_samples=2, **options)
        list(writer.stream(rows[0], Settings(**options)))

    requests([[1], [2], [3], [4]], max_new_tokens=16, sampler=WARM, **kept)
    compiled.clear()
    for length in range(1, 17):
        requests(
            [[1] * length, [1, 7], [5] * 3, [6] * 16],
            max_new_tokens=16 - length % 3,
            sampler=TopP(0.5 + length / 99, temperature=length),
            seed=length,
            stop=["wex"] * (length % 2),
            stop_tokens=list(range(9, 9 + length % 7)),
            **kept,
        )
    assert not compiled


@pytest.mark.parametrize("batch", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_after_warming_up_nothing_is_compiled(compiled, capsys, batch):
    speaker, told = llm(config=SHORT), {}
    seconds = speaker.warm_up(batch=batch, sampler=WARM, watch=told.__setitem__)
    assert seconds == told and all(value > 0 for value in seconds.values())
    assert list(seconds) == [
        f"prefill of {batch} x 64 positions",
        f"prefill of {batch} x 100 positions",
        f"decode of {batch} rows",
    ]
    assert capsys.readouterr().out == ""
    compiled.clear()
    for length in (1, 5, 64, 65, 99):
        speaker.generate(
            [[1 + row] * length for row in range(batch)], sampler=WARM, seed=length
        )
    if batch == 1:
        list(speaker.stream([1] * 7, sampler=WARM))
        speaker.start_chat(sampler=WARM, max_new_tokens=9).send("Wex?")
    assert not compiled
    # It says what it does, if nobody else is told; and has nothing left to do.
    speaker.warm_up(batch=batch, sampler=WARM)
    assert capsys.readouterr().out.count(" s\n") == 3 and not compiled


PROGRAM = """
import sys
from collections import Counter
import jax
counts = Counter()
jax.monitoring.register_event_listener(lambda event, **_: counts.update([event]))
import llama_jax
llm = llama_jax.load(sys.argv[1])
for length in (3, 100):
    print(llm.generate([[1] * length], max_new_tokens=5, sampler=llama_jax.Greedy()))
said = "".join(llm.stream([1, 5], max_new_tokens=5, sampler=llama_jax.Greedy()))
events = ("cache_hits", "cache_misses")
print(*(counts["/jax/compilation_cache/" + event] for event in events))
"""


@pytest.mark.slow
def test_a_second_process_compiles_nothing(tmp_path):
    """On one device, where the cache of compiled programs is on by default."""
    llm(config=LONG).save(tmp_path / "model")
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
    }
    found = []
    for _ in range(2):
        ran = subprocess.run(
            [sys.executable, "-c", PROGRAM, tmp_path / "model"],
            env=env | {"XDG_CACHE_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, ran.stderr
        *texts, counts = ran.stdout.splitlines()
        found.append((texts, *map(int, counts.split())))
    (first, _, missed), (second, hits, missed_again) = found
    print(f"compiled: {missed} programs, then {missed_again}; read back: {hits}")
    assert missed > 0 and missed_again == 0 and hits >= missed
    assert [t.partition(", timing")[0] for t in first] == [
        t.partition(", timing")[0] for t in second
    ]
    place = tmp_path / "llama-jax" / "compilations"
    assert place.stat().st_mode & 0o777 == 0o700 and any(place.iterdir())
