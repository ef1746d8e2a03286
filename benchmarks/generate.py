"""Generation on this machine's cores, side by side with what pip installs.

    python benchmarks/generate.py [--peers DIRECTORY] [--workdir DIRECTORY]

A Llama 2 of 134 million random parameters, float32, the same weights on every side:
this project, and with int8 weights; transformers (PyTorch), and through torch.compile;
tunix and FlaxLlama (JAX); llama.cpp, and with q8_0 weights. Each peer gets a virtual
environment of its own in `--peers`, made where it is missing: minutes, since llama.cpp
is compiled for this processor. One that cannot be installed or run is left out.

Each contender is a process (`peers/generators.py`), and only one works at a time: in
each round each of them does the same work, in turn, and its best time counts. The first
round, which compiles, does not. Decoding is the time of 65 greedy tokens less that of
1, in caches of 256; prefill is 512 ids until the token after them. The first token is
that of a new process, from its start: imports, weights, 16 ids. It wants a quiet
machine: threads that spin while they wait for others, as OpenMP's do, lose the most.

Prints tokens per second, and the share of tokens that are those of this project; then
what this project is of its peers, beside what it has to be.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

import llama_jax
from llama_jax.build import build
from llama_jax.checkpoint.params import save_params
from llama_jax.config import LlamaConfig
from sharding import MeshConfig, decoding_rules, make_mesh

CONFIG = LlamaConfig(
    vocab_size=32000,
    dim=768,
    num_layers=12,
    num_heads=12,
    num_kv_heads=12,
    hidden_dim=2048,
    norm_eps=1e-5,
    rope_theta=1e4,
    max_length=1024,
)
PROMPT, NEW, BATCH, CACHE = 16, 64, 8, 256
PROCESSES = 3

Rows = list[list[int]]
# The number of rows, the length of each prompt, and how many tokens to write.
Work = tuple[int, int, int]


def decoding(num_rows: int, new: int) -> Work:
    """To write after short prompts."""
    return num_rows, PROMPT, new


PREFILL: Work = 1, 512, 1
# By the length of the cache.
WORK = {
    CACHE: [decoding(rows, new) for rows in (1, BATCH) for new in (1, 1 + NEW)],
    3 * CACHE: [PREFILL],
}

OURS, INT8, LLAMA_CPP = "llama-jax", "llama-jax int8", "llama.cpp f32"
TORCH = ("transformers", "transformers, compiled")
PYTHON = (*TORCH, "tunix", "FlaxLlama")
# What contenders need, installed in a directory of the first one's name.
REQUIREMENTS = {
    TORCH: ["torch==2.13.0", "transformers==5.23.0"],
    ("tunix",): ["google-tunix==0.1.7", "jax==0.10.2"],
    ("FlaxLlama",): ["transformers==4.57.6", "flax==0.11.2", "jax==0.10.2"],
    (LLAMA_CPP, "llama.cpp q8_0"): [
        "llama-cpp-python==0.3.36",
        "gguf==0.19.0",
        "safetensors==0.8.0",
    ],
}
GENERATORS = Path(__file__).parent / "peers" / "generators.py"

console = Console()


class ContenderError(Exception):
    """It cannot be installed, or its process ended."""


class Contender:
    """A contender at work in a process of its own, which begins at once.

    Args:
      name: what `generators.py` calls it.
      python: the interpreter that has it.
      scratch: for compiled programs, and for what it says.
    """

    def __init__(
        self, name: str, python: Path, models: Path, cache_length: int, scratch: Path
    ) -> None:
        self._name = name
        self._log = scratch / f"{name}.log"
        environment = os.environ | dict.fromkeys(
            ("XDG_CACHE_HOME", "TMPDIR"), str(scratch)
        )
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [python, GENERATORS, name, models, str(cache_length)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )

    def generate(self, num_rows: int, length: int, new: int) -> tuple[float, Rows]:
        """Seconds, and the tokens after each of that many prompts.

        Raises:
          ContenderError: the process ended.
        """
        assert self._process.stdin and self._process.stdout
        draw = random.Random(num_rows).randrange
        rows = [
            [draw(3, CONFIG.vocab_size) for _ in range(length)] for _ in range(num_rows)
        ]
        with contextlib.suppress(BrokenPipeError):
            question = json.dumps({"rows": rows, "new": new})
            print(question, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise ContenderError(f"it ended: {self._log.read_text()[-400:]}")
        answer = json.loads(answer)
        tokens = answer["tokens"]
        assert {len(row) for row in tokens} == {new}, f"{self._name} stops early"
        return answer["seconds"], tokens

    def close(self) -> None:
        """End it, if it has not ended."""
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()


def make_models(directory: Path) -> None:
    """The same random weights as Orbax's files and as Hugging Face's."""
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    model = build(CONFIG, mesh, decoding_rules(), dtype="float32", remat="none")
    save_params(directory / "orbax", model.init(seed=0), CONFIG, None)
    llama_jax.convert(directory / "orbax", directory / "hf", to="hf")


def install(directory: Path, requirements: list[str]) -> Path:
    """The Python of an environment, made if it is not there as it should be.

    Raises:
      ContenderError: what pip says.
    """
    python, done = directory / "bin" / "python", directory / "requirements.txt"
    if done.exists() and done.read_text().split() == requirements:
        return python
    console.print(f"installing {' '.join(requirements)}")
    subprocess.run([sys.executable, "-m", "venv", "--clear", directory], check=True)
    pip = subprocess.run(
        [python, "-m", "pip", "install", *requirements],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"CMAKE_ARGS": "-DLLAVA_BUILD=OFF"},  # no images: half of it
    )
    if pip.returncode:
        raise ContenderError(f"pip ended with {pip.returncode}: {pip.stderr[-400:]}")
    done.write_text("\n".join(requirements))
    return python


def find(peers: Path) -> dict[str, Path]:
    """The Python of each contender that can be had."""
    pythons = dict.fromkeys((OURS, INT8), Path(sys.executable))
    for names, requirements in REQUIREMENTS.items():
        try:
            python = install(peers / names[0].split()[0], requirements)
        except ContenderError as error:
            console.print(f"without {', '.join(names)}: {error}", markup=False)
        else:
            pythons |= dict.fromkeys(names, python)
    return pythons


def measure(
    pythons: dict[str, Path], models: Path, cache_length: int, rounds: int
) -> dict[tuple[str, Work], tuple[float, Rows]]:
    """The best seconds of each contender for each work, and the tokens.

    Who fails is left out, here and from `pythons`.
    """
    best = dict[tuple[str, Work], tuple[float, Rows]]()
    with tempfile.TemporaryDirectory(dir=models) as scratch:
        contenders = {
            name: Contender(name, python, models, cache_length, Path(scratch))
            for name, python in pythons.items()
        }
        for number in range(rounds + 1):
            for name in list(pythons):
                try:
                    answers = {
                        w: contenders[name].generate(*w) for w in WORK[cache_length]
                    }
                except ContenderError as error:
                    console.print(f"without {name}: {error}", markup=False)
                    del pythons[name]
                    continue
                for work, answer in answers.items():
                    if number:
                        best[name, work] = min(answer, best.get((name, work), answer))
        for contender in contenders.values():
            contender.close()
    return best


def first_tokens(name: str, python: Path, models: Path) -> tuple[float, float]:
    """Seconds from the start of a process: with nothing compiled yet, and once more."""
    seconds = list[float]()
    with tempfile.TemporaryDirectory(dir=models) as scratch:
        for _ in range(2):
            start = time.perf_counter()
            contender = Contender(name, python, models, CACHE, Path(scratch))
            contender.generate(*decoding(1, 1))
            seconds.append(time.perf_counter() - start)
            contender.close()
    return seconds[0], seconds[1]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    peers = caches / "llama-jax" / "peers"
    parser.add_argument("--peers", type=Path, default=peers, help="environments")
    parser.add_argument(
        "--workdir", type=Path, help="where 2 GB of weights go, a while"
    )
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    pythons = find(options.peers)
    with tempfile.TemporaryDirectory(dir=options.workdir) as directory:
        models = Path(directory)
        make_models(models)
        best = dict[tuple[str, Work], tuple[float, Rows]]()
        for cache_length in WORK:
            best |= measure(pythons, models, cache_length, options.rounds)
        waits = [first_tokens(OURS, pythons[OURS], models) for _ in range(PROCESSES)]
        cold, warm = map(statistics.median, zip(*waits, strict=True))
        firsts = {
            name: cold if name == OURS else first_tokens(name, python, models)[0]
            for name, python in pythons.items()
        }

    def rate(name: str, num_rows: int) -> float:
        most, one = (best[name, decoding(num_rows, n)][0] for n in (1 + NEW, 1))
        return NEW * num_rows / (most - one)

    def written(name: str) -> list[int]:
        rows = (best[name, decoding(num_rows, 1 + NEW)][1] for num_rows in (1, BATCH))
        return [token for row in itertools.chain(*rows) for token in row]

    single = {name: rate(name, 1) for name in pythons}
    batch = {name: rate(name, BATCH) for name in pythons}
    prefill = {name: PREFILL[1] / best[name, PREFILL][0] for name in pythons}
    table = Table("tokens per second", title=f"best of {options.rounds} rounds")
    for heading in ("decode", f"decode {BATCH}", "prefill", "same tokens", "cold, s"):
        table.add_column(heading, justify="right")
    for name in pythons:
        pairs = zip(written(name), written(OURS), strict=True)
        table.add_row(
            name,
            f"{single[name]:.1f}",
            f"{batch[name]:.0f}",
            f"{prefill[name]:.0f}",
            f"{statistics.mean(mine == theirs for theirs, mine in pairs):.0%}",
            f"{firsts[name]:.1f}",
        )
    console.print(table)

    def ratio(rates: dict[str, float], peers: Iterable[str], name: str = OURS) -> str:
        found = [rates[peer] for peer in peers if peer in rates]
        return f"{rates[name] / max(found):.2f}" if found else "none"

    table = Table("this project", "measured", "at least", "goal")
    every = (*PYTHON, LLAMA_CPP)
    for row in (
        ("decode 1 of the best", ratio(single, every), "0.95", "1.05"),
        (f"decode {BATCH} of the best in Python", ratio(batch, PYTHON), "1.1", ""),
        (f"decode {BATCH} of llama.cpp", ratio(batch, [LLAMA_CPP]), "", "1.0"),
        ("prefill of transformers", ratio(prefill, TORCH), "1.2", ""),
        ("prefill of llama.cpp", ratio(prefill, [LLAMA_CPP]), "", "1.0"),
        ("int8 decode 1 of float32", ratio(single, [OURS], INT8), "1.3", "2.5"),
        ("first token, cold", f"{cold:.1f} s", "6 s", "4 s"),
        ("first token, warm", f"{warm:.1f} s", "4 s", "2.5 s"),
    ):
        table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    main()
