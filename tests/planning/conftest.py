"""Planning with and without the TPU compiler."""

import importlib.util

import pytest


@pytest.fixture
def without_compiler(monkeypatch):
    """As where libtpu is not installed."""
    find_spec = importlib.util.find_spec

    def find(name, *args):
        return None if name == "libtpu" else find_spec(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", find)
