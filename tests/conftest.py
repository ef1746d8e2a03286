"""What every test stands on: eight simulated devices, and Meta's answers if present.

`LLAMA_REFERENCE` names a folder of values computed by Meta's own code. A test that
takes the fixture `reference` is one of its cases: without the folder these are left
out, and the last lines of a run say how many ran or were left out.
"""

import os
from pathlib import Path

# Before anything imports jax, which reads these once. Subprocesses inherit them.
os.environ["JAX_PLATFORMS"] = "cpu"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    ).strip()
# What one test has compiled, another, or the next run, need not compile again.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(Path(__file__).parents[1] / ".pytest_cache" / "compilations"),
)

import importlib.metadata
import platform

import hypothesis
import pytest

# The first example compiles, which takes longer than any deadline; and a failure is
# of use when the next run shows it again.
hypothesis.settings.register_profile("house", deadline=None, derandomize=True)
hypothesis.settings.load_profile("house")

REFERENCE = os.environ.get("LLAMA_REFERENCE", "")
LEFT_OUT = pytest.StashKey[int]()


@pytest.fixture(scope="session")
def reference() -> Path:
    """The folder of answers computed by Meta's code."""
    return Path(REFERENCE).resolve()


def pytest_configure(config):
    if REFERENCE and not Path(REFERENCE).is_dir():
        raise pytest.UsageError(
            f"LLAMA_REFERENCE is {REFERENCE!r}, which is not a folder: "
            "correct it, or unset it to leave the reference cases out."
        )
    config.stash[LEFT_OUT] = 0


def pytest_report_header():
    packages = ("jax", "flax", "orbax-checkpoint", "grain")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    return ", ".join([f"python {platform.python_version()}", *versions])


@pytest.hookimpl(trylast=True)  # after `-m` and `-k`, so that only their choice counts
def pytest_collection_modifyitems(config, items):
    cases = [item for item in items if "reference" in item.fixturenames]
    if REFERENCE:
        for case in cases:
            case.user_properties.append(("reference", True))
    elif cases:
        config.stash[LEFT_OUT] = len(cases)
        config.hook.pytest_deselected(items=cases)
        items[:] = [item for item in items if "reference" not in item.fixturenames]


# With pytest-xdist the collecting is done by workers, each of which sees every case.


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash[LEFT_OUT]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    left_out = getattr(node, "workeroutput", {}).get("left_out", 0)
    node.config.stash[LEFT_OUT] = max(node.config.stash[LEFT_OUT], left_out)


def pytest_terminal_summary(terminalreporter, config):
    if not REFERENCE:
        terminalreporter.write_line(
            f"LLAMA_REFERENCE is not set: {config.stash[LEFT_OUT]} reference cases "
            "left out"
        )
        return
    ran = sum(
        ("reference", True) in getattr(report, "user_properties", ())
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, ())
        if report.when == "call"
    )
    terminalreporter.write_line(f"reference cases: {ran} ran from {REFERENCE}")
