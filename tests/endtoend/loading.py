"""One host of several that load a checkpoint, run by test_hosts_load.py.

Prints one JSON object: what this host found.
"""

import contextlib
import gc
import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

import llama_jax
from llama_jax.conversion import meta, open_checkpoint
from llama_jax.errors import LlamaError
from llama_jax.llm import LLM
from sharding import MeshConfig, ShardingError, hosts, make_mesh

# The settings that `load` has here; anything else about the model is in the files.
SETTINGS = {"max_length": 64}


def memory() -> int:
    """Bytes that only this process has; mapped files are the system's."""
    status = Path("/proc/self/status").read_text()
    found = re.findall(r"Rss(?:Anon|Shmem):\s*(\d+) kB", status)
    return 1024 * sum(map(int, found))


class Peak:
    """The most memory within a block, beyond what there was before it."""

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        gc.collect()
        before = self._most = memory()
        ended = threading.Event()
        thread = threading.Thread(target=self._sample, args=(ended,))
        thread.start()
        yield
        ended.set()
        thread.join()
        self.num_bytes = max(self._most, memory()) - before

    def _sample(self, ended: threading.Event) -> None:
        while not ended.wait(0.002):
            self._most = max(self._most, memory())


def load(path: str, mesh: jax.sharding.Mesh) -> tuple[LLM, int, float]:
    """The model, the growth of memory, and the seconds it took."""
    peak, start = Peak(), time.monotonic()
    with peak.watched():
        llm = llama_jax.load(path, mesh=mesh, **SETTINGS)
        jax.block_until_ready(llm.engine.weights)
    return llm, peak.num_bytes, time.monotonic() - start


def held(tree) -> int:
    """Bytes of a tree that this host's devices hold."""
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
    )


def differing(params, path: str) -> list[str]:
    """Leaves of which a part on this host is not what a checkpoint's files say."""
    opened = open_checkpoint(path, **SETTINGS)
    found = []
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(keys, simple=True, separator="/")
        assert leaf.dtype == opened.dtype
        for shard in leaf.addressable_shards:
            expected = opened.read(name, shard.index)
            if not np.array_equal(np.asarray(shard.data), expected):
                found.append(name)
    return found


def complaint(path: str, mesh: jax.sharding.Mesh) -> str:
    try:
        llama_jax.load(path, mesh=mesh, **SETTINGS)
    except (LlamaError, ShardingError) as error:
        return str(error)
    return ""


def main() -> None:
    """Words: `measure MESH SMALL LARGE OTHER`, or `complain` and directories."""
    what, *words = sys.argv[2:]
    hosts.start()
    digested = []
    compute = meta.md5s

    def noted(files, **how):
        digested.extend(file.name for file in files)
        return compute(files, **how)

    meta.md5s = noted
    if what == "measure":
        sizes, small, large, other = words
        mesh = make_mesh(MeshConfig(**json.loads(sizes)))
        _, runtime, _ = load(small, mesh)
        digested.clear()
        llm, growth, seconds = load(large, mesh)
        weights, read = llm.engine.weights, list(digested)
        found = {
            "runtime": runtime,
            "growth": growth,
            "seconds": seconds,
            "held": held(weights),
            # What is loaded at a time, and is there in two forms until it is done.
            "largest": max(map(held, (*weights.layers, weights.unembed))),
            "digested": read,
            "differing": [differing(llm.params, path) for path in (large, other)],
        }
    else:
        mesh = make_mesh(MeshConfig())
        found = [complaint(path, mesh) for path in words]
    print(f"found: {json.dumps(found)}", flush=True)
