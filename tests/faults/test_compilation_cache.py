"""A compilation cache that cannot be used is a warning, and nothing more."""

import os
import subprocess
import sys

PROGRAM = """
import logging; logging.basicConfig()
import jax, jax.numpy as jnp
from sharding import hosts
hosts.cache_compilations()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
print(float(jax.jit(lambda x: jnp.sin(x) * 3 + 1)(jnp.float32(0))))
"""


def run(cache) -> subprocess.CompletedProcess[str]:
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) == 1
    return ran


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    ran = run(tmp_path / "file" / "cache")
    assert "Compiled programs are not kept" in ran.stderr
    assert "JAX_COMPILATION_CACHE_DIR" in ran.stderr


def test_entries_that_are_damaged(tmp_path):
    assert "not kept" not in run(tmp_path).stderr
    entries = [path for path in tmp_path.rglob("*") if path.name.endswith("-cache")]
    assert entries
    for entry in entries:
        entry.write_bytes(b"damaged")
    run(tmp_path)


def test_several_cpu_devices_keep_nothing_unless_told(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    program = """
import jax
from sharding import hosts
hosts.cache_compilations()
print(jax.device_count(), jax.config.jax_compilation_cache_dir)
"""
    for flags, said in (
        ("--xla_force_host_platform_device_count=2", "2 None"),
        ("", f"1 {tmp_path}/llama-jax/compilations"),
    ):
        ran = subprocess.run(
            [sys.executable, "-c", program],
            env=env | {"XLA_FLAGS": flags, "XDG_CACHE_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert ran.stdout.strip() == said
