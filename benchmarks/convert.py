"""A whole model through every format and back: memory, rate, and the same bits.

    python benchmarks/convert.py DIRECTORY [--config llama2_7b] [--model-parallel 1]

Makes a checkpoint of Meta's with random weights of a Llama 2's shape (bfloat16, 13.5 GB
for 7B), then converts Meta -> Orbax -> Hugging Face -> Meta in other shards -> Orbax,
each leg by `llama-jax convert` in a process of its own. Beside each leg, `cp` and fsync
of the same bytes on the same disk; both begin with none of their source in memory.

Prints for each leg: seconds, those of `cp`, and the speed as a share of its speed; the
peak of anonymous and shared memory (mapped files are the system's cache, and not
counted), proof included; seconds to read the result back and compare digests and
logits; the digest of all weights, which has to stay. Needs twice the model's bytes on
the disk.
"""

import argparse
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from etils import epath

from llama_jax.config import LlamaConfig
from llama_jax.conversion import layout, names
from llama_jax.conversion.targets import MetaTarget

DTYPE = jnp.dtype("bfloat16")
# Narrow enough that logits of 80 random layers stay finite, wide enough that a wrong
# order of features would move them.
SCALE = 0.02


def make_checkpoint(directory: Path, config: LlamaConfig, num_shards: int) -> None:
    """A checkpoint of Meta's with random weights, written slab by slab."""
    target = MetaTarget(epath.Path(directory), config, DTYPE, num_shards)
    sizes = names.axis_sizes(config)

    def make(weight: names.Weight) -> None:
        num_rows, *columns = weight.parameter.hf.shape(sizes)
        rng = np.random.default_rng(abs(hash_of(weight.name)))
        for start, stop in layout.slabs(weight, sizes, DTYPE.itemsize):
            drawn = rng.standard_normal((stop - start, *columns), np.float32) * SCALE
            target.write(weight, start, (drawn + (not columns)).astype(DTYPE))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(make, names.weights(config)))
    target.finish(None)
    target.close()


def hash_of(name: str) -> int:
    """A seed for a name, the same in every process."""
    return int.from_bytes(name.encode()[-8:] + name.encode()[:8], "big")


def forget(directory: Path) -> None:
    """Write out what is in a directory, and let go of it in the system's cache."""
    for file in directory.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def copy_seconds(source: Path, target: Path) -> float:
    """How long `cp` and fsync of a directory take; the copy is removed again."""
    forget(source)
    start = time.perf_counter()
    subprocess.run(["cp", "-rL", source, target], check=True)
    files = [file for file in target.rglob("*") if file.is_file()]
    subprocess.run(["sync", *files], check=True)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def run(command: Sequence[str]) -> tuple[str, int]:
    """What a command prints, and its peak of RssAnon + RssShmem in bytes."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = 0

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                return
            found = re.findall(r"Rss(?:Anon|Shmem):\s+(\d+) kB", status)
            peak = max(peak, 1024 * sum(map(int, found)))
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    printed, _ = process.communicate()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit status {process.returncode}")
    return printed, peak


def main() -> None:
    """Make, convert, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="where there is room")
    parser.add_argument("--config", default="llama2_7b", help="a preset of LlamaConfig")
    parser.add_argument("--num-layers", type=int, help="fewer, to try it out")
    parser.add_argument("--model-parallel", type=int, default=1, help="first shards")
    arguments = parser.parse_args()
    config: LlamaConfig = getattr(LlamaConfig, arguments.config)()
    if arguments.num_layers:
        config = dataclasses.replace(config, num_layers=arguments.num_layers)
    work = arguments.directory / "conversions"
    work.mkdir(parents=True)
    shards = arguments.model_parallel
    place = work / f"meta-{shards}"
    start = time.perf_counter()
    make_checkpoint(place, config, shards)
    print(f"made {place.name} in {time.perf_counter() - start:.0f} s", flush=True)
    print(
        f"{'leg':24} {'s':>7} {'cp, s':>7} {'of cp':>6} {'peak MB':>8} "
        f"{'proof, s':>8}  weights' sha256"
    )
    other = 2 if shards == 1 else shards // 2
    legs = [
        ("orbax", ["orbax"]),
        ("hf", ["hf"]),
        (f"meta-{other}", ["meta", "--model-parallel", str(other)]),
        ("orbax-again", ["orbax"]),
    ]
    for name, options in legs:
        result = work / name
        copied = copy_seconds(place, work / "copy")
        forget(place)
        program = Path(sys.executable).with_name("llama-jax")
        command = [str(program), "convert", str(place), str(result), "--to", *options]
        printed, peak = run(command)
        seconds = float(re.findall(r" in ([\d.]+) s \(", printed)[0])
        proof = float(re.findall(r"read back in ([\d.]+) s", printed)[0])
        digest = re.findall(r"sha256 (\w{16})", printed)[0]
        print(
            f"{place.name + ' -> ' + name:24} {seconds:7.1f} {copied:7.1f} "
            f"{copied / seconds:6.2f} {peak / 1e6:8.0f} {proof:8.1f}  {digest}",
            flush=True,
        )
        shutil.rmtree(place)
        place = result


if __name__ == "__main__":
    main()
