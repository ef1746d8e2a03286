"""Runs of several hosts: as many processes on this machine, over `jax.distributed`."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from llama_jax.train.metrics import METRICS, read_metrics

ROOT = Path(__file__).parents[2]
# Of all hosts together, whatever their number.
NUM_DEVICES = 8
# Enough for any case here on a busy machine; a hang is a failure.
SECONDS = 150

TRAIN = "import llama_jax.cli as c; raise SystemExit(c.main())"


class Job:
    """`llama-jax train` on several hosts; a context that leaves none of them behind.

    Args:
      folder: gets what the hosts write on their terminals.
      argv: what follows `llama-jax train` on each host.
      programs: what a host runs if it is not the plain command: {host: python}.
    """

    def __init__(
        self,
        folder: Path,
        *argv: Sequence[str],
        programs: Mapping[int, str] | None = None,
    ) -> None:
        folder.mkdir(exist_ok=True)
        devices = NUM_DEVICES // len(argv)
        env = os.environ | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "PYTHONPATH": str(ROOT),
        }
        if len(argv) > 1:  # one host alone starts as anyone's does
            env["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{free_port()}"
            env["JAX_NUM_PROCESSES"] = str(len(argv))
        self._logs = [folder / f"host-{host}.txt" for host in range(len(argv))]
        self.hosts: list[subprocess.Popen[bytes]] = []
        for host, words in enumerate(argv):
            program = (programs or {}).get(host, TRAIN)
            if len(argv) > 1:
                env["JAX_PROCESS_ID"] = str(host)
            with self._logs[host].open("w") as output:
                self.hosts.append(
                    subprocess.Popen(
                        [sys.executable, "-c", program, "train", *words],
                        env=env,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        for host in self.hosts:
            host.kill()
            host.wait()

    def ends(self) -> list[int]:
        """The status of each host, when all have ended."""
        limit = time.monotonic() + SECONDS
        return [host.wait(limit - time.monotonic()) for host in self.hosts]

    def said(self, host: int) -> str:
        """What a host has written."""
        return self._logs[host].read_text()

    def everything(self) -> str:
        """What all have written, for the message of a test that fails."""
        return "\n".join(f"host {i}: {self.said(i)}" for i in range(len(self.hosts)))

    def wait_for_step(self, workdir: Path, step: int) -> None:
        """Until this many steps have been measured."""
        limit = time.monotonic() + SECONDS
        while (
            max((r["step"] for r in read_metrics(workdir / METRICS)), default=0) < step
        ):
            assert all(host.poll() is None for host in self.hosts), self.everything()
            assert time.monotonic() < limit, self.everything()
            time.sleep(0.01)


def free_port() -> int:
    """A port of this machine that nothing listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
