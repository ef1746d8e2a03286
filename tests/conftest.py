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


@pytest.fixture
def agree(request):
    """A check that a difference is within a tolerance; the run's last lines list all.

    `agree("logits", 3e-6, within=1e-4)` for this test's case.
    """
    name = getattr(request.node, "callspec", None)
    case = name.id if name else request.node.name.removeprefix("test_")

    def check(quantity: str, difference: float, *, within: float) -> None:
        row = (case, quantity, float(difference), within)
        request.node.user_properties.append(("agreement", row))
        assert difference <= within, row

    return check


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
    _print_agreement(terminalreporter)
    ran = sum(
        ("reference", True) in getattr(report, "user_properties", ())
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, ())
        if report.when == "call"
    )
    terminalreporter.write_line(f"reference cases: {ran} ran from {REFERENCE}")


def _print_agreement(terminalreporter):
    """The worst difference of each quantity of each case, beside what is allowed."""
    worst = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, ()):
            for key, row in getattr(report, "user_properties", ()):
                if key == "agreement" and report.when == "call":
                    case, quantity, difference, within = row
                    before, _ = worst.get((case, quantity), (0.0, within))
                    worst[case, quantity] = max(before, difference), within
    if worst:
        terminalreporter.section("agreement with Meta's code: worst differences")
    for (case, quantity), (difference, within) in sorted(worst.items()):
        terminalreporter.write_line(
            f"{case:28} {quantity:34} {difference:9.2e}  allowed {within:.0e}"
        )
