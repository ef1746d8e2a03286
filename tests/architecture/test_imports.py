"""Who may import what. The layers themselves: `make check` (import-linter)."""

import ast
import subprocess
import sys
import textwrap

import pytest

from tests.architecture.tree import PACKAGES, ROOT

# Where a package may be used, and what it may use beside the standard library.
ONLY_HERE = {
    "flax": ("llama_jax/model/transformer.py", "llama_jax/model/heads.py"),
    "tyro": ("llama_jax/cli/",),
}
ONLY_THESE = {
    "sharding/": {"jax", "numpy", "jaxtyping", "sharding"},
    "llama_jax/config/": {"sharding", "llama_jax.config", "llama_jax.errors"},
}
# Seconds that `import llama_jax` may add to jax's own.
IMPORT_BUDGET = 0.1


def imports_of(source: str) -> set[str]:
    """Every module that a source names in an import, also inside a function."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names.add(str(node.module))
    return names


IMPORTS = {
    path.relative_to(ROOT).as_posix(): imports_of(path.read_text())
    for package in PACKAGES
    for path in (ROOT / package).rglob("*.py")
}


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("package", ONLY_HERE)
def test_contained(package):
    users = {
        file
        for file, names in IMPORTS.items()
        if any(within(name, package) for name in names)
    }
    assert users, f"nothing imports {package}"
    assert {file for file in users if not file.startswith(ONLY_HERE[package])} == set()


@pytest.mark.parametrize("folder", ONLY_THESE)
def test_foundations_need_little(folder):
    foreign = {
        (file, name)
        for file, names in IMPORTS.items()
        if file.startswith(folder)
        for name in names
        if name.split(".")[0] not in sys.stdlib_module_names
        and not any(within(name, allowed) for allowed in ONLY_THESE[folder])
    }
    assert foreign == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_seen_by_import_linter(package):
    """It passes over a folder without `__init__.py`, whatever that imports."""
    folders = {path.parent for path in (ROOT / package).rglob("*.py")}
    assert folders
    assert not [path for path in folders if not (path / "__init__.py").exists()]


def test_import_is_light():
    program = textwrap.dedent("""
        import sys, time, jax
        before, start = set(sys.modules), time.perf_counter()
        import llama_jax
        print(time.perf_counter() - start)
        print(*{name.split(".")[0] for name in set(sys.modules) - before})
    """)

    def measure() -> tuple[float, set[str]]:
        run = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        seconds, modules = run.stdout.splitlines()
        return float(seconds), set(modules.split())

    seconds, modules = measure()
    third_party = modules - set(sys.stdlib_module_names) - set(PACKAGES)
    assert third_party == set(), "llama_jax is imported lazily"
    # A busy machine can be slow once, not three times.
    assert seconds < IMPORT_BUDGET or min(measure()[0] for _ in "ab") < IMPORT_BUDGET


def test_deprecations_in_our_modules_are_errors():
    warn = "import warnings; warnings.warn('old', DeprecationWarning, stacklevel=1)"
    for module in ("llama_jax", "llama_jax.model.layers", "sharding.mesh"):
        with pytest.raises(DeprecationWarning, match="old"):
            exec(warn, {"__name__": module})
    with pytest.warns(DeprecationWarning, match="old"):
        exec(warn, {"__name__": "somebody.elses"})
