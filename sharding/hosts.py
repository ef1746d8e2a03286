"""What a host does for the program: start-up, its rows of a batch, agreement."""

import hashlib
import json
import logging
import os
import tempfile
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from sharding.errors import ShardingError

_log = logging.getLogger(__name__)

_CACHE_DIR = "jax_compilation_cache_dir"


def start() -> None:
    """Join the other hosts of this job, if there are any; before any device is used.

    JAX finds them by itself on TPU VMs and GKE, under Slurm and MPI; elsewhere
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say who they are.

    Raises:
      ShardingError: these variables are set, and there is no joining by them.
    """
    if jax.distributed.is_initialized():
        return
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    try:
        if address is None:
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(
                coordinator_address=address,
                num_processes=int(os.environ["JAX_NUM_PROCESSES"]),
                process_id=int(os.environ["JAX_PROCESS_ID"]),
            )
    except (ValueError, RuntimeError, KeyError) as error:
        # Without an address: no cluster was found, or devices are in use already.
        if address is not None:
            raise ShardingError(
                f"cannot join the hosts at {address}: {type(error).__name__}: {error}. "
                "Set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID on "
                "every host, before JAX uses a device."
            ) from error
        _log.debug("One host alone: %s", error)


def global_rows(local: Any, sharding: jax.sharding.NamedSharding) -> Any:
    """One batch over all hosts, from the rows that each host holds.

    Args:
      local: a tree of arrays, [rows of this host, ...].
      sharding: the layout of the whole; hosts' rows follow one another.

    Raises:
      ValueError: the layout gives two hosts the same rows, as where `tensor` spans
        hosts; each of these would bring other ones.
    """

    def whole(rows: np.ndarray) -> jax.Array:
        shape = (rows.shape[0] * jax.process_count(), *rows.shape[1:])
        return jax.make_array_from_process_local_data(sharding, rows, shape)

    return jax.tree.map(whole, local)


def require_agreement(**facts: Any) -> None:
    """Make sure that every host was started with the same recipe, data and code.

    Args:
      facts: what must agree, by name; anything that JSON can hold.

    Raises:
      ShardingError: on every host, naming the facts that differ.
    """
    if jax.process_count() == 1:
        return
    digests = np.stack([_digest(facts[name]) for name in sorted(facts)])
    everywhere = multihost_utils.process_allgather(digests)
    differ = [
        name
        for i, name in enumerate(sorted(facts))
        if (everywhere[:, i] != everywhere[0, i]).any()
    ]
    if differ:
        raise ShardingError(
            f"host {jax.process_index()} of {jax.process_count()}: the hosts do not "
            f"agree on {', '.join(differ)}: start all of them with the same command, "
            "code and files."
        )


def _digest(fact: Any) -> np.ndarray:
    text = json.dumps(fact, sort_keys=True).encode()
    return np.frombuffer(hashlib.sha256(text).digest(), np.uint8)


def cache_compilations() -> None:
    """Keep compiled programs on disk, so that the next process need not compile them.

    Where JAX is told already (JAX_COMPILATION_CACHE_DIR), nothing changes; else it is
    told, for this process: the user's cache directory. One that cannot be written is a
    warning: everything works without, only later.
    """
    directory = getattr(jax.config, _CACHE_DIR)
    chosen = directory is not None
    if not chosen:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        directory = os.path.join(home, "llama-jax", "compilations")
    if "://" not in directory:
        try:
            os.makedirs(directory, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory):
                pass
        except OSError as error:
            _log.warning(
                "Compiled programs are not kept: %s. Set JAX_COMPILATION_CACHE_DIR to "
                "a directory that can be written.",
                error,
            )
            jax.config.update(_CACHE_DIR, None)
            return
    if not chosen:
        jax.config.update(_CACHE_DIR, directory)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
