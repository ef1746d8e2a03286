"""Parameters saved and loaded: the same values, on any mesh, or a clear refusal."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.build import build
from llama_jax.checkpoint.arrays import Arrays
from llama_jax.checkpoint.params import ARCHITECTURE, open_params, save_params
from llama_jax.config import LlamaConfig
from llama_jax.errors import CheckpointError
from sharding import MeshConfig, make_mesh, training_rules

CONFIG = LlamaConfig.tiny()


def place(mesh: MeshConfig, num_devices: int):
    return build(
        CONFIG,
        make_mesh(mesh, jax.devices()[:num_devices]),
        training_rules(sequence_parallel=False),
        dtype="float32",
        remat="none",
    )


@pytest.fixture(scope="module")
def eight():
    return place(MeshConfig(fsdp=4, tensor=2), 8)


@pytest.fixture(scope="module")
def params(eight):
    return eight.init(seed=3)


@pytest.fixture
def saved(params, tmp_path):
    save_params(tmp_path / "saved", params, CONFIG, None)
    return tmp_path / "saved"


@pytest.mark.parametrize(
    ("mesh", "num_devices"),
    [(MeshConfig(), 1), (MeshConfig(tensor=2), 2), (MeshConfig(data=2, fsdp=4), 8)],
    ids=str,
)
def test_round_trip_is_exact_on_any_mesh(saved, params, mesh, num_devices):
    sharded = place(mesh, num_devices)
    source = open_params(saved)
    assert source.config == CONFIG
    assert source.dtype == jnp.float32
    assert source.tokenizer_path is None
    loaded = source.load(sharded.param_shardings, dtype=jnp.dtype("float32"))
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    for leaf, sharding in zip(
        jax.tree.leaves(loaded), jax.tree.leaves(sharded.param_shardings), strict=True
    ):
        assert leaf.sharding == sharding


def test_what_is_saved_is_not_compressed(saved):
    stored = Arrays(saved / "params").open("blocks.mlp.up").spec().to_json()
    assert stored["metadata"]["compressor"] is None


def test_loads_in_another_type(saved, params):
    source = open_params(saved)
    one = place(MeshConfig(), 1)
    loaded = source.load(one.param_shardings, dtype=jnp.dtype("bfloat16"))
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, np.asarray(b, jnp.bfloat16)),
        loaded,
        params,
    )


def test_a_directory_that_holds_something_is_left_alone(saved, params):
    before = sorted(saved.rglob("*"))
    with pytest.raises(CheckpointError, match="not empty: choose another place"):
        save_params(saved, params, CONFIG, None)
    assert sorted(saved.rglob("*")) == before


def test_a_place_that_cannot_be_written_is_said(params, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_params(tmp_path / "file" / "model", params, CONFIG, None)


def change_architecture(directory, **fields):
    path = directory / ARCHITECTURE
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_another_shape_than_the_architecture_says_is_refused(saved):
    change_architecture(saved, hidden_dim=96)
    with pytest.raises(
        CheckpointError,
        match=r"blocks.mlp.down is \(2, 160, 64\), expected \(2, 96, 64\)",
    ):
        open_params(saved)


def test_an_architecture_that_cannot_be_is_refused(saved):
    change_architecture(saved, num_kv_heads=3)
    with pytest.raises(CheckpointError, match="num_kv_heads 3 does not divide"):
        open_params(saved)
    change_architecture(saved, num_kv_heads=4, depth=1)
    with pytest.raises(CheckpointError, match="depth"):
        open_params(saved)


def test_interrupted_saving_is_no_checkpoint(saved):
    (saved / "params").rename(saved / "params.orbax-checkpoint-tmp")
    with pytest.raises(CheckpointError, match="interrupted before it was whole"):
        open_params(saved)


def test_interrupted_saving_can_be_done_again(saved, params):
    (saved / "params").rename(saved / "params.orbax-checkpoint-tmp")
    save_params(saved, params, CONFIG, None)
    assert open_params(saved).config == CONFIG


def test_a_damaged_file_is_said(saved):
    for file in (saved / "params").rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=r"cannot be read"):
        open_params(saved).load(
            place(MeshConfig(), 1).param_shardings, dtype=jnp.dtype("float32")
        )


def test_plain_orbax_restores_it(saved, params):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(
            saved / "params", jax.tree.map(np.zeros_like, jax.device_get(params))
        )
    jax.tree.map(np.testing.assert_array_equal, restored, params)
    assert dataclasses.asdict(CONFIG) == json.loads((saved / ARCHITECTURE).read_text())
