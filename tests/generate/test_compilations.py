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
from tests.generate.models import CONFIG, LONG, generator, llm

WARM = TopP(0.95, temperature=1.5)


def write(writer: Generator, prompts, *, echo=False, num_samples=1, **options):
    return writer.generate(
        prompts, Settings(**options), echo=echo, num_samples=num_samples
    )


def test_fifty_prompts_of_random_lengths(compiled, monkeypatch):
    """Up to 1024 tokens, one at a time."""
    # A model of its own, for which no other test has compiled anything.
    config = dataclasses.replace(LONG, norm_eps=2e-5)
    writer = generator(config=config)
    lengths = np.random.default_rng(0).integers(1, config.max_length, 50).tolist()
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
    assert 0 < prefills <= math.log2(config.max_length / 64) + 1
    assert set(counts.values()) == {1, prefills} and counts["jit(decode)"] == 1


def test_new_requests_compile_nothing(compiled):
    writer = generator()
    first = {"max_new_tokens": 16, "sampler": WARM}
    rows = [[1], [2], [3], [4]]
    write(writer, rows, echo=True, **first)
    write(writer, rows[:2], num_samples=2, **first)
    write(writer, rows, penalties=Penalties(presence=1.0), **first)
    write(writer, rows, allowed=lambda _: [5], **first)
    list(writer.stream([1], Settings(**first)))
    compiled.clear()
    for length in range(1, 17):
        options = {
            "max_new_tokens": 16 - length % 3,
            "sampler": TopP(0.5 + length / 99, temperature=length),
            "seed": length,
            "stop": ["wex"] * (length % 2),
            "stop_tokens": list(range(9, 9 + length % 7)),
        }
        rows = [[1] * length, [1, 7], [5] * 3, [6] * 16]
        write(writer, rows, echo=True, **options)
        write(writer, rows[:2], num_samples=2, **options)
        write(writer, rows, penalties=Penalties(frequency=length / 9), **options)
        write(writer, rows, allowed=lambda _, n=length: [5, 6 + n], **options)
        list(writer.stream(rows[0], Settings(**options)))
    assert not compiled


@pytest.mark.parametrize("batch", [1, 3])
def test_after_warming_up_nothing_is_compiled(compiled, capsys, batch):
    config = dataclasses.replace(CONFIG, max_length=300, norm_eps=3e-5)
    speaker, told = llm(config=config), {}
    seconds = speaker.warm_up(batch=batch, sampler=WARM, watch=told.__setitem__)
    assert seconds == told and all(value > 0 for value in seconds.values())
    assert list(seconds) == [
        f"prefill of {batch} x 64 positions",
        f"prefill of {batch} x 128 positions",
        f"prefill of {batch} x 256 positions",
        f"prefill of {batch} x 300 positions",
        f"decode of {batch} rows",
    ]
    assert capsys.readouterr().out == ""
    compiled.clear()
    for length in (1, 5, 64, 65, 200, 299):
        speaker.generate(
            [[1 + row] * length for row in range(batch)], sampler=WARM, seed=length
        )
    if batch == 1:
        list(speaker.stream([1] * 7, sampler=WARM))
        speaker.start_chat(sampler=WARM, max_new_tokens=9).send("Wex?")
    assert not compiled
    # It says what it does, if nobody else is told; and has nothing left to do.
    speaker.warm_up(batch=batch, sampler=WARM)
    assert capsys.readouterr().out.count(" s\n") == 5 and not compiled


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
