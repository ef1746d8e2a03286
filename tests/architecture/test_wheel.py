"""What `pip install llama-jax` puts on a disk."""

import zipfile

import pytest
from hatchling.builders.wheel import WheelBuilder

import llama_jax
from tests.architecture.tree import PACKAGES, ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    (path,) = WheelBuilder(str(ROOT)).build(
        directory=str(folder), versions=["standard"]
    )
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_exactly_two_packages(wheel):
    info = f"llama_jax-{llama_jax.__version__}.dist-info"
    assert {name.split("/")[0] for name in wheel.namelist()} == {*PACKAGES, info}


def test_every_module_is_inside(wheel):
    """A pattern of .gitignore can take a module out of the wheel unnoticed."""
    modules = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
    }
    assert modules == {name for name in wheel.namelist() if name.endswith(".py")}


def test_command_and_licence(wheel):
    info = f"llama_jax-{llama_jax.__version__}.dist-info"
    assert (
        "llama-jax = llama_jax.cli:main"
        in wheel.read(f"{info}/entry_points.txt").decode()
    )
    assert (
        "Copyright 2026 The llama-jax authors"
        in wheel.read(f"{info}/licenses/LICENSE").decode()
    )
