"""Compiled steps, kept on disk: planning the same again takes no compiling.

One is known by the recipe, the topology, the versions of JAX and libtpu, and the source
of this project; so a change to any of them compiles anew.
"""

import dataclasses
import functools
import gzip
import hashlib
import importlib.metadata
import json
import logging
import os
from pathlib import Path

import jax

import llama_jax
import sharding
from llama_jax.config.recipe import TrainingRecipe, to_json
from llama_jax.planning import topology as tpu
from llama_jax.planning.compile import CompiledStep, Memory, compile_step
from llama_jax.planning.topology import Topology
from sharding import make_mesh

_log = logging.getLogger(__name__)


def compiled(recipe: TrainingRecipe, topology: Topology) -> CompiledStep:
    """What `compile_step` gives, from disk if it gave it before.

    Raises:
      PlanError: libtpu is missing or fails.
      ShardingError: mesh, model, batch and topology do not divide.
    """
    kept = _directory() / f"{_digest(recipe, topology)}.json.gz"
    if kept.exists():
        facts = json.loads(gzip.decompress(kept.read_bytes()))
        return CompiledStep(
            recipe=recipe,
            topology=topology,
            mesh=make_mesh(recipe.mesh, tpu.devices(topology)),
            memory=Memory(**facts["memory"]),
            text=facts["text"],
            problem=facts["problem"],
            seconds=facts["seconds"],
        )
    step = compile_step(recipe, topology)
    facts = {
        "memory": dataclasses.asdict(step.memory),
        "text": step.text,
        "problem": step.problem,
        "seconds": step.seconds,
    }
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}")
        part.write_bytes(gzip.compress(json.dumps(facts).encode(), compresslevel=1))
        part.rename(kept)  # whole or not at all, whoever else reads or writes
    except OSError as error:
        _log.warning("The compiled step is not kept: %s.", error)
    return step


def _directory() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "llama-jax" / "plans"


def _digest(recipe: TrainingRecipe, topology: Topology) -> str:
    facts = {
        "recipe": to_json(recipe),
        "topology": topology.name,
        "slices": topology.slices,
        "jax": jax.__version__,
        "libtpu": importlib.metadata.version("libtpu"),
        "source": _source_digest(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@functools.cache
def _source_digest() -> str:
    digest = hashlib.sha256()
    for package in (llama_jax, sharding):
        for path in sorted(Path(str(package.__file__)).parent.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
