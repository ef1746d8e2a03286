"""What a host does for the program: start-up, its rows of a batch, agreement, end.

The hosts of a job live and end together: each step of one waits for all. JAX's
coordination service, a part of the first host, notices one that is gone; what this
adds is a message, a status, and an end where JAX would wait.
"""

import contextlib
import ctypes
import functools
import hashlib
import json
import logging
import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np

# For barriers with a time limit: JAX has no public name for this client.
from jax._src import distributed
from jax.experimental import multihost_utils

from sharding.errors import ShardingError

_log = logging.getLogger(__name__)

_Results = TypeVar("_Results")

_CACHE_DIR = "jax_compilation_cache_dir"

_COORDINATOR = "JAX_COORDINATOR_ADDRESS"
_NUM_HOSTS = "JAX_NUM_PROCESSES"
_HOST = "JAX_PROCESS_ID"

# A host that ends waits so long for the others to end too.
_LEAVE_SECONDS = 5

# What JAX says when it was not told of other hosts, or told too late: one host alone.
_ALONE = ("coordinator_address should be defined", "must be called before any JAX")
# What it says when a computation failed because another host was lost.
_LOST = ("Gloo", "UNAVAILABLE", "DEADLINE_EXCEEDED", "Connection closed by peer")


class _Abort:
    """The end that JAX gives to this process when another host is lost: abort().

    A handler written in C's terms, since one of Python's would run only after abort()
    has ended the process.
    """

    _Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)

    def __init__(self) -> None:
        self.status = 1
        self.message = ""
        self._handler = self._Handler(self._on_abort)
        self._signal = ctypes.CDLL(None).signal
        self._signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        self._signal.restype = ctypes.c_void_p

    def _on_abort(self, number: int) -> None:
        del number
        os.write(2, self.message.encode())
        os._exit(self.status)

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """From here on; beyond the block too, if several hosts have joined in it."""
        handler = ctypes.cast(self._handler, ctypes.c_void_p)
        before = self._signal(signal.SIGABRT, handler)
        try:
            yield
        finally:
            if distributed.global_state.num_processes == 1:
                self._signal(signal.SIGABRT, before)


_abort = _Abort()


def start(
    *, heartbeat_seconds: int = 50, join_seconds: int = 300, lost_status: int = 1
) -> None:
    """Join the other hosts of this job, if there are any; before any device is used.

    JAX finds them by itself on TPU VMs and on GKE, under Slurm and MPI. Elsewhere
    three variables tell each host: JAX_COORDINATOR_ADDRESS, where the first host
    listens, as 10.0.0.1:8476; JAX_NUM_PROCESSES; and JAX_PROCESS_ID, from 0. With none
    of these, the host is alone.

    Args:
      heartbeat_seconds: a host that is silent for so long is lost.
      join_seconds: how long the hosts wait for one another now.
      lost_status: exit status of this process if another host is lost, or if the
        hosts do not meet.

    Raises:
      ShardingError: the variables are not all set, or make no sense; or a cluster was
        found, and there is no joining it.
    """
    if jax.distributed.is_initialized():
        return
    given = _given()
    where = f" at {given['coordinator_address']}" if given else ""
    _abort.status = lost_status
    _abort.message = (
        f"llama-jax: the hosts did not meet{where} within {join_seconds} s: start all "
        f"of them, with the address of the first ({_COORDINATOR}) where each other one "
        "can reach it.\n"
    )
    # Signals are ours: see train/faults.py, which also knows Ctrl-C and a second one.
    jax.config.update("jax_enable_preemption_service", False)
    with _abort.handled():
        try:
            jax.distributed.initialize(
                **given,
                heartbeat_timeout_seconds=heartbeat_seconds,
                initialization_timeout=join_seconds,
            )
        except (ValueError, RuntimeError, OSError) as error:
            if not given and any(sign in str(error) for sign in _ALONE):
                _log.debug("One host alone: %s", error)
                return
            raise ShardingError(
                f"cannot join the hosts{where}: {type(error).__name__}: {error}. Start "
                "every host before JAX uses a device, each with the same "
                f"{_COORDINATOR} and {_NUM_HOSTS}, and its own {_HOST}."
            ) from error
    _abort.message = (
        f"llama-jax: {_name()}: another host was lost, as JAX says above. Whole "
        "checkpoints stay: start every host again.\n"
    )


def _given() -> Mapping[str, Any]:
    """What the variables say, as arguments of `jax.distributed.initialize`."""
    names = (_COORDINATOR, _NUM_HOSTS, _HOST)
    values = {name: os.environ[name] for name in names if os.environ.get(name)}
    if not values:
        return {}
    if missing := [name for name in names if name not in values]:
        raise ShardingError(
            f"{' and '.join(values)} set, but not {' and '.join(missing)}: set all "
            "three on every host; or none, where JAX finds the hosts itself."
        )
    address, num_hosts, host = values.values()
    if not address.rpartition(":")[2].isdigit():
        raise ShardingError(f"{_COORDINATOR} is {address!r}: give host and port.")
    if not num_hosts.isdigit() or not int(num_hosts):
        raise ShardingError(f"{_NUM_HOSTS} is {num_hosts!r}: give a positive number.")
    if not host.isdigit() or int(host) >= int(num_hosts):
        raise ShardingError(
            f"{_HOST} is {host!r}: give this host's number, from 0 to "
            f"{int(num_hosts) - 1}, since {_NUM_HOSTS} is {num_hosts}."
        )
    return {
        "coordinator_address": address,
        "num_processes": int(num_hosts),
        "process_id": int(host),
    }


def leave(message: str, *, status: int) -> NoReturn:
    """End this process, one of several, with a message and a status; at once.

    An error that only travelled up would end in JAX's own farewell, which waits some
    minutes for hosts that may be gone, or be waiting for this one.
    """
    # The service ends with the first host, and JAX then aborts those behind it.
    _abort.status, _abort.message = status, ""
    os.write(2, f"llama-jax: {_name()}: {message}\n".encode())
    client = distributed.global_state.client
    assert client is not None, "one host alone has nobody to leave"
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        client.wait_at_barrier("sharding.hosts.leave", 1000 * _LEAVE_SECONDS)
    os._exit(status)


def is_loss(error: BaseException) -> bool:
    """Whether a computation failed because another host was lost."""
    runtime = isinstance(error, jax.errors.JaxRuntimeError)
    return runtime and any(sign in str(error) for sign in _LOST)


def _name() -> str:
    state = distributed.global_state  # known before there are devices
    return f"host {state.process_id} of {state.num_processes}"


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
            f"the hosts do not agree on {', '.join(differ)}: start all of them with "
            "the same command, code and files."
        )


def any_host(yes: bool, *, after: Any = None) -> jax.Array | bool:
    """Whether any host says yes, the same on all: it may be still on its way.

    Every host has to ask, at the same place of the program.

    Args:
      yes: what this host says.
      after: results that are still being computed, see `in_turn`.
    """
    if jax.process_count() == 1:
        return yes
    mesh, count = _ballot()
    split = jax.sharding.NamedSharding(mesh, jax.P("device"))
    votes = np.full(jax.local_device_count(), yes)
    in_turn(after)
    with jax.set_mesh(mesh):
        return in_turn(count(jax.make_array_from_process_local_data(split, votes)))


def in_turn(results: _Results) -> _Results:
    """What a program computes, before another begins that does not depend on it.

    A chip runs programs one after the other. CPUs do not, and gloo, which joins those
    of several hosts, takes the messages of one program for those of another; so there
    the results are waited for.
    """
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        return jax.block_until_ready(results)
    return results


@functools.cache
def _ballot() -> tuple[jax.sharding.Mesh, Callable[[jax.Array], jax.Array]]:
    """Every device has a vote; and the program that looks for a yes."""
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("device",))
    return mesh, jax.jit(lambda votes: votes.any(), out_shardings=jax.P())


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """What fails inside on one host fails on every host; no others go on and wait.

    Raises:
      ShardingError: on the hosts where it did not fail.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error  # raised below, after all hosts have said how it went
    failed = bool(any_host(failure is not None))
    if failure is not None:
        raise failure
    if failed:
        raise ShardingError("another host cannot go on: its own message says why.")


def _digest(fact: Any) -> np.ndarray:
    text = json.dumps(fact, sort_keys=True).encode()
    return np.frombuffer(hashlib.sha256(text).digest(), np.uint8)


def cache_compilations() -> None:
    """Keep compiled programs on disk, so that the next process need not compile them.

    Where JAX is told already (JAX_COMPILATION_CACHE_DIR), nothing changes; else it is
    told, for this process: the user's cache directory, which is made for the user alone
    (mode 0700), since what lies there is run. One that cannot be written is a warning:
    everything works without, only later.

    Not for several CPU devices, simulated or of several processes, unless JAX is told:
    read back from disk, their programs lose the order of collectives that do not depend
    on one another, and these take each other's data (jaxlib 0.10.2).
    """
    directory = getattr(jax.config, _CACHE_DIR)
    chosen = directory is not None
    if not chosen and jax.default_backend() == "cpu" and jax.device_count() > 1:
        return
    if not chosen:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        directory = os.path.join(home, "llama-jax", "compilations")
    if "://" not in directory:
        try:
            os.makedirs(directory, mode=0o700, exist_ok=True)
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
        # Of many small programs, each takes long in a process that lasts for seconds.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
