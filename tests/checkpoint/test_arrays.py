"""Orbax's arrays in parts: plain Orbax reads what is written, and the other way."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from llama_jax.checkpoint.arrays import Arrays

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
TREE = {
    "blocks": {"gate": np.arange(4 * 6 * 10).reshape(4, 6, 10).astype(BFLOAT16)},
    "scale": np.linspace(0, 1, 7).astype(np.float32),
    "zeros": np.zeros((3, 3), np.float16),
}
FLAT = {"blocks.gate": TREE["blocks"]["gate"], "scale": TREE["scale"]}
FLAT |= {"zeros": TREE["zeros"]}


@pytest.fixture
def place(tmp_path):
    """A directory whose name needs care in a URL."""
    directory = epath.Path(tmp_path) / "späce #1 100%"
    directory.mkdir()
    return directory


def test_plain_orbax_restores_what_is_written_in_parts(place):
    arrays = Arrays(place)
    for name, array in FLAT.items():
        chunk = tuple(-(-size // 2) for size in array.shape)
        arrays.create(name, array.shape, chunk, array.dtype)
        for row in range(len(array)):
            arrays.write(name, (slice(row, row + 1),), array[row : row + 1])
    arrays.describe({name: array.shape for name, array in FLAT.items()})
    arrays.commit()
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(place)
    for name, array in FLAT.items():
        found = restored
        for key in name.split("."):
            found = found[key]
        assert found.dtype == array.dtype
        assert np.asarray(found).tobytes() == array.tobytes()


@pytest.mark.parametrize("ocdbt", [False, True])
@pytest.mark.parametrize("zarr3", [False, True])
def test_what_orbax_writes_is_read_in_parts(place, ocdbt, zarr3):
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3)
    tree = {"blocks": {"gate": jnp.asarray(FLAT["blocks.gate"])}}
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(place / "params", args=ocp.args.PyTreeSave(tree))
    part = Arrays(place / "params").open("blocks.gate")[1:3, :, 4:6].read().result()
    assert np.array_equal(part, FLAT["blocks.gate"][1:3, :, 4:6])


def test_an_array_that_was_begun_is_gone_on_with(place):
    array = FLAT["scale"]
    for half in (slice(0, 4), slice(4, 7)):
        arrays = Arrays(place)
        arrays.create("scale", array.shape, (2,), array.dtype)
        arrays.write("scale", (half,), array[half])
    arrays.describe({"scale": array.shape})
    assert np.array_equal(Arrays(place).open("scale").read().result(), array)


def test_what_the_system_refuses_is_an_os_error(place):
    (place / "file").write_text("no directory")
    with pytest.raises(OSError, match="file"):
        Arrays(place / "file").create("a", (1,), (1,), np.dtype(np.float32))
