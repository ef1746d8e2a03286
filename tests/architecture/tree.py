"""The files of the project, for the tests that read them."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("llama_jax", "sharding")
FOLDERS = (
    *PACKAGES,
    "configs",
    "scripts",
    "tests",
    "docs",
    "benchmarks",
    ".ci",
    ".github",
)


def files() -> list[Path]:
    """Every file of the project; what tools leave behind is not part of it."""
    top = [path for path in ROOT.iterdir() if path.is_file()]
    below = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    return [
        path
        for path in sorted(top + below)
        if path.is_file() and "__pycache__" not in path.parts
    ]
