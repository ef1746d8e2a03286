"""Signals become decisions; the second one ends the process, whatever it is doing."""

import os
import signal
import subprocess
import sys
import time

import pytest

from llama_jax.train import faults
from tests import runs

SETTINGS = runs.recipe("data").train


def wait_until_asked(guard: faults.Guard) -> None:
    """The signal is taken by a thread, a moment after it was sent."""
    limit = time.monotonic() + 10
    while not guard.stop_requested and time.monotonic() < limit:
        time.sleep(0.001)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_after_the_step(number):
    before = signal.getsignal(number)
    with faults.guard(SETTINGS) as guard:
        assert guard.decide(3, None) == faults.Decision(
            validate=False, save=False, stop=False
        )
        os.kill(os.getpid(), number)
        wait_until_asked(guard)
        assert guard.stop_now()
        assert guard.decide(4, None) == faults.Decision(
            validate=False, save=True, stop=True
        )
    assert signal.getsignal(number) is before


def test_a_second_signal_ends_a_process_that_is_busy_outside_of_python():
    """As the compiler is, for minutes; Python's own handlers would wait for it."""
    program = (
        "import hashlib\n"
        "from llama_jax.train import faults\n"
        "from tests import runs\n"
        "with faults.guard(runs.recipe('data').train):\n"
        "    print('busy', flush=True)\n"
        "    hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)\n"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "busy\n"
            process.terminate()
            time.sleep(0.2)
            assert process.poll() is None
            process.terminate()
            assert process.wait(timeout=30) == 128 + signal.SIGTERM
        finally:
            process.kill()
