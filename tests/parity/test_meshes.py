"""The answer is the same on every mesh: logits, loss, gradients, three steps."""

import copy
import dataclasses

import numpy as np
import pytest

from sharding import MeshConfig
from tests.compilation import compiled_anew
from tests.parity import tolerances
from tests.parity.conftest import (
    CONFIG,
    CROSSING,
    logits_of,
    place,
    require_same,
    start,
    train,
)

slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def anew():
    with compiled_anew():
        yield


def case(marks=(), sequence=False, crossing="", **sizes):
    """A mesh, named after its axes."""
    name = "-".join(f"{axis}{size}" for axis, size in sizes.items())
    name += f"-{crossing}" * bool(crossing) + "-sequence" * sequence
    mesh = MeshConfig(**{"fsdp": 1} | sizes)
    return pytest.param(mesh, sequence, crossing, id=name, marks=marks)


@pytest.mark.parametrize(
    ("mesh", "sequence_parallel", "crossing"),
    [
        case(fsdp=8),
        case(data=8, marks=slow),
        case(fsdp=2, tensor=4),
        case(fsdp=2, tensor=4, sequence=True),
        case(fsdp=4, tensor=2, marks=slow),
        case(fsdp=4, tensor=2, sequence=True, marks=slow),
        case(data=2, fsdp=2, tensor=2),
        case(data=2, fsdp=2, tensor=2, sequence=True, marks=slow),
        # Twice as many devices along `tensor` as there are key/value heads.
        case(tensor=8),
        case(tensor=8, sequence=True, marks=slow),
        # Attention across devices: a part of each row on each.
        case(context=8, crossing="ring", marks=slow),
        case(context=8, crossing="gathered", marks=slow),
        case(fsdp=2, context=2, tensor=2, crossing="ring", marks=slow),
        case(fsdp=2, context=2, tensor=2, crossing="gathered"),
        case(fsdp=2, context=2, tensor=2, crossing="ring", sequence=True, marks=slow),
        case(context=4, tensor=2, crossing="gathered", sequence=True, marks=slow),
        case(data=2, fsdp=2, context=2, crossing="ring", marks=slow),
        case(data=2, context=2, tensor=2, crossing="ring"),
        # Factors across slices.
        case(dcn_data=2, fsdp=2, tensor=2, marks=slow),
        case(dcn_data=2, data=2, fsdp=2, marks=slow),
        case(dcn_data=2, dcn_fsdp=2, context=2, crossing="ring", marks=slow),
    ],
)
def test_eight_devices_give_what_one_gives(
    mesh, sequence_parallel, crossing, one_device, alone, params, capfd
):
    sharded = place(
        mesh, num_devices=8, sequence_parallel=sequence_parallel, crossing=crossing
    )
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "sequence_parallel", "crossing"),
    [
        case(data=2, context=2, tensor=2, crossing="ring", sequence=True),
        case(data=2, fsdp=2, context=2, crossing="gathered"),
        case(dcn_data=2, tensor=4, sequence=True),
        case(tensor=8),
    ],
)
def test_all_that_saves_memory_together(
    mesh, sequence_parallel, crossing, alone, params
):
    """Parts of the batch and of the vocabulary, and remat along the depth."""
    sharded = place(
        mesh, num_devices=8, sequence_parallel=sequence_parallel, crossing=crossing
    )
    model = sharded.model.clone(remat="attention_block:1,attention")
    sharded = dataclasses.replace(sharded, model=model, loss_chunks=4)
    trained = train(sharded, start(sharded, params), accumulate=2)
    require_same(trained, alone)


@pytest.mark.slow
@pytest.mark.parametrize("crossing", CROSSING)
def test_one_key_head_on_four_devices_of_a_ring(crossing, params):
    """Copies of key/value heads, and rows split over devices, together."""
    config = dataclasses.replace(CONFIG, num_kv_heads=1)
    first_head = copy.deepcopy(params)
    for name in ("key", "value"):
        heads = first_head["blocks"]["attention"][name]
        first_head["blocks"]["attention"][name] = heads[:, :, :1]
    trained = {}
    for mesh, options in (
        (MeshConfig(fsdp=1), {"num_devices": 1}),
        (
            MeshConfig(fsdp=1, context=2, tensor=4),
            {"num_devices": 8, "crossing": crossing},
        ),
    ):
        sharded = place(mesh, config=config, **options)
        state = start(sharded, first_head)
        trained[sharded.model.kv_copies] = train(sharded, state, accumulate=1)
    require_same(trained[4], trained[1])


def test_three_steps_do_something(alone, params):
    """Otherwise the above would hold of any two meshes."""
    assert alone.losses[0] > 5
    assert min(alone.norms) > 1.0, "the clip is to act"
    moved = alone.params["blocks"]["mlp"]["up"] - params["blocks"]["mlp"]["up"]
    assert np.abs(moved).max() > 1e-3
