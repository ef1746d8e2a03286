"""From nothing to the first token, as processes of their own.

    python benchmarks/cold_start.py CHECKPOINT [--tokenizer FILE]

Prints, as medians over several processes: what `import llama_jax` adds to `import jax`;
seconds from the start of Python to the first token with an empty compilation cache, and
with a warm one; and the share of `import jax` in that, which nothing here can lower.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

IMPORT_JAX = "import jax"
IMPORT_BOTH = "import jax, llama_jax"
FIRST_TOKEN = """
import sys, llama_jax
llm = llama_jax.load(sys.argv[1], tokenizer=sys.argv[2] if sys.argv[2:] else None)
next(llm.stream([1], sampler=llama_jax.Greedy(), max_new_tokens=64))
"""


def seconds(program: str, *arguments: str, cache: str) -> float:
    """Wall-clock seconds of a Python process that runs a program."""
    environment = os.environ | {"XDG_CACHE_HOME": cache}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", program, *arguments], check=True, env=environment
    )
    return time.perf_counter() - start


def median(program: str, *arguments: str, runs: int, cache: str | None) -> float:
    """The median over `runs` processes; each with an empty cache if none is given."""
    measured = []
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as empty:
            measured.append(seconds(program, *arguments, cache=cache or empty))
    return statistics.median(measured)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--tokenizer")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    load = [options.checkpoint, *([options.tokenizer] if options.tokenizer else [])]
    with tempfile.TemporaryDirectory() as cache:
        seconds(FIRST_TOKEN, *load, cache=cache)
        jax = median(IMPORT_JAX, runs=options.runs, cache=cache)
        both = median(IMPORT_BOTH, runs=options.runs, cache=cache)
        cold = median(FIRST_TOKEN, *load, runs=options.runs, cache=None)
        warm = median(FIRST_TOKEN, *load, runs=options.runs, cache=cache)
    print(f"import llama_jax after jax   {both - jax:+.3f} s")
    print(f"first token, cold            {cold:.2f} s  ({cold / jax:.1f} x import jax)")
    print(f"first token, warm cache      {warm:.2f} s  ({warm / jax:.1f} x import jax)")


if __name__ == "__main__":
    main()
