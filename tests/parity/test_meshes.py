"""The answer is the same on every mesh: logits, loss, gradients, three steps."""

import numpy as np
import pytest

from sharding import MeshConfig
from tests.parity import tolerances
from tests.parity.conftest import logits_of, place, require_same, start, train

slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("mesh", "sequence_parallel"),
    [
        pytest.param(MeshConfig(fsdp=8), False, id="fsdp8"),
        pytest.param(MeshConfig(fsdp=2, tensor=4), False, id="fsdp2-tensor4"),
        pytest.param(MeshConfig(fsdp=2, tensor=4), True, id="fsdp2-tensor4-sequence"),
        pytest.param(
            MeshConfig(fsdp=4, tensor=2), False, id="fsdp4-tensor2", marks=slow
        ),
        pytest.param(
            MeshConfig(fsdp=4, tensor=2), True, id="fsdp4-tensor2-sequence", marks=slow
        ),
        pytest.param(
            MeshConfig(data=2, fsdp=2, tensor=2), False, id="data2-fsdp2-tensor2"
        ),
        pytest.param(
            MeshConfig(data=2, fsdp=2, tensor=2),
            True,
            id="data2-fsdp2-tensor2-sequence",
            marks=slow,
        ),
    ],
)
def test_eight_devices_give_what_one_gives(
    mesh, sequence_parallel, one_device, alone, params, capfd
):
    sharded = place(mesh, num_devices=8, sequence_parallel=sequence_parallel)
    np.testing.assert_allclose(
        logits_of(sharded, params),
        logits_of(one_device, params),
        rtol=0,
        atol=tolerances.ORDER_LOGITS,
    )
    trained = train(sharded, start(sharded, params), accumulate=1)
    require_same(trained, alone)
    # XLA says so when a layout can only be reached by way of a whole copy everywhere.
    assert "Involuntary full rematerialization" not in capfd.readouterr().err


def test_three_steps_do_something(alone, params):
    """Otherwise the above would hold of any two meshes."""
    assert alone.losses[0] > 5
    assert min(alone.norms) > 1.0, "the clip is to act"
    moved = alone.params["blocks"]["mlp"]["up"] - params["blocks"]["mlp"]["up"]
    assert np.abs(moved).max() > 1e-3
