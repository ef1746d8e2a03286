"""Attention across devices is attention, at any length, in memory that does not grow
with its square."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.build import build_for
from llama_jax.model import layers, mask, tiles
from llama_jax.model.flash import FlashPart
from llama_jax.model.ring import GatheredAttention, RingAttention
from llama_jax.planning.topology import devices, parse
from sharding import MeshConfig, make_mesh, training_rules
from sharding.context import placement, places
from tests import runs
from tests.compilation import compiled_anew


@pytest.fixture(autouse=True)
def anew():
    with compiled_anew():
        yield


RULES = training_rules(sequence_parallel=False)
# Tiles small enough that a device has several.
FORMS = {
    "ring": functools.partial(RingAttention, rules=RULES, tile=4),
    "gathered": functools.partial(GatheredAttention, rules=RULES),
    "gathered-dot": functools.partial(
        GatheredAttention, rules=RULES, inner=layers.attend
    ),
}
MESHES = {
    "context8": MeshConfig(fsdp=1, context=8),
    "fsdp2-context2-tensor2": MeshConfig(fsdp=2, context=2, tensor=2),
    "data2-context4": MeshConfig(data=2, fsdp=1, context=4),
}
B, T, N, K, H = 2, 64, 8, 4, 16


def arrays(length=T, *, heads=(N, K), rows=B, dtype=np.float32):
    """q, k, v and a gradient of the result."""
    rng = np.random.default_rng(0)
    return [
        jnp.asarray(2 * rng.normal(size=(rows, length, n, H)), dtype)
        for n in (heads[0], heads[1], heads[1], heads[0])
    ]


def documents(length=T, *, rows=B):
    """Which of some documents each token belongs to; other ones in each row."""
    starts = np.random.default_rng(1).random((rows, length)) < 4 / length
    return np.cumsum(starts, axis=1).astype(np.int32)


def values_and_gradients(attend, mesh, q, k, v, d_out, pattern):
    @jax.jit
    def run(q, k, v, pattern):
        def weighed(q, k, v):
            out = attend(q, k, v, pattern)
            return jnp.sum(out * d_out), out

        return jax.grad(weighed, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    with jax.set_mesh(mesh):
        grads, out = run(q, k, v, pattern)
    return {"out": out, **dict(zip("qkv", grads, strict=True))}


def across(form, mesh, given, segments):
    """The same of rows that are put in order first, and back after."""
    length, parts = given[0].shape[1], mesh.shape["context"]
    order, back = placement(length, parts), places(length, parts)
    if segments is not None:
        segments = segments[:, order]
    pattern = mask.causal(length, segments, jnp.asarray(order)[None])
    placed = [x[:, order] for x in given]
    result = values_and_gradients(FORMS[form](mesh=mesh), mesh, *placed, pattern)
    return {name: np.asarray(x)[:, back] for name, x in result.items()}


def require_close(got, expected, *, relative):
    for name, value in expected.items():
        value = np.asarray(value)
        np.testing.assert_allclose(
            got[name],
            value,
            rtol=0,
            atol=relative * np.abs(value).max(),
            err_msg=name,
        )


@functools.cache
def alone(packed: bool):
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    pattern = mask.causal(T, documents() if packed else None)
    return values_and_gradients(layers.attend, mesh, *arrays(), pattern)


def cases():
    """Every form on every mesh, with documents and without; some of them quickly."""
    quick = {
        ("ring", "context8", False),
        ("ring", "fsdp2-context2-tensor2", True),
        ("gathered", "fsdp2-context2-tensor2", True),
        ("gathered-dot", "data2-context4", True),
    }
    for case in itertools.product(FORMS, MESHES, (False, True)):
        name = "-".join((*case[:2], "documents" if case[2] else "causal"))
        marks = () if case in quick else pytest.mark.slow
        yield pytest.param(*case, id=name, marks=marks)


@pytest.mark.parametrize(("form", "sizes", "packed"), list(cases()))
def test_every_form_is_attention(form, sizes, packed):
    mesh = make_mesh(MESHES[sizes])
    got = across(form, mesh, arrays(), documents() if packed else None)
    require_close(got, alone(packed), relative=2e-6)


@pytest.mark.parametrize("form", ["ring", "gathered"])
def test_rows_in_their_own_order_give_the_same(form):
    """The order balances the work; what is right is said by the positions."""
    mesh = make_mesh(MESHES["fsdp2-context2-tensor2"])
    pattern = mask.causal(T, documents())
    got = values_and_gradients(FORMS[form](mesh=mesh), mesh, *arrays(), pattern)
    require_close(got, alone(True), relative=2e-6)


def test_the_gathered_kernel_gets_rows_in_the_order_of_their_positions():
    """As kernels expect that are causal by themselves; and queries of two chunks."""
    mesh, seen = make_mesh(MESHES["data2-context4"]), []

    def inner(q, k, v, pattern):
        assert q.shape == (B // 2, T // 4, N, H) and k.shape == (B // 2, T, K, H)
        jax.debug.callback(
            lambda *x: seen.append([np.asarray(a) for a in x]),
            jax.lax.axis_index("context"),
            k,
            pattern.key_positions,
            pattern.query_positions,
        )
        return layers.attend(q, k, v, pattern)

    q, k, v, _ = arrays()
    order = placement(T, 4)
    attend = GatheredAttention(rules=RULES, mesh=mesh, inner=inner)
    with jax.set_mesh(mesh):
        jax.block_until_ready(
            jax.jit(attend)(
                *(x[:, order] for x in (q, k, v)),
                mask.causal(T, positions=jnp.asarray(order)[None]),
            )
        )
    jax.effects_barrier()
    assert len(seen) == 8
    for index, keys, key_positions, query_positions in seen:
        assert any((keys[0] == np.asarray(row)).all() for row in k)
        np.testing.assert_array_equal(key_positions[0], np.arange(T))
        here = order.reshape(4, -1)[index]
        np.testing.assert_array_equal(query_positions[0], here)


@pytest.mark.parametrize(
    ("sizes", "settings", "kernel"),
    [
        ({"context": 2}, {}, RingAttention),
        ({"context": 2}, {"context_attention": "gathered"}, GatheredAttention),
        ({}, {"context_attention": "gathered"}, type(layers.attend)),
    ],
)
def test_a_recipe_says_which(sizes, settings, kernel):
    recipe = runs.changed(runs.recipe("data"), "train", **settings)
    sharded = build_for(recipe, make_mesh(MeshConfig(**sizes)))
    assert type(sharded.model.attend) is kernel


def test_gathered_attention_has_the_kernel_of_the_recipe():
    mesh = make_mesh(MeshConfig(context=2))
    for name, kernel in {
        "dot": tiles.attend,
        "splash": FlashPart(axis="context"),
    }.items():
        recipe = runs.changed(
            runs.recipe("data"), "train", context_attention="gathered", attention=name
        )
        assert build_for(recipe, mesh).model.attend.inner == kernel


# A row of 32k tokens, as it is meant for.
LONG = 32_768


@pytest.mark.slow
@pytest.mark.parametrize("form", [RingAttention, GatheredAttention])
def test_32k_tokens_are_full_attention(form, monkeypatch):
    """Full attention of 512 queries from everywhere in the row, over all of its keys.

    The others get no gradient, so that the gradients of all keys and values come from
    these: the whole square of scores, 4 GiB, need not exist for comparison.
    """
    monkeypatch.setitem(FORMS, "long", functools.partial(form, rules=RULES))
    q, k, v, d_out = arrays(LONG, heads=(1, 1), rows=1)
    some = np.sort(np.random.default_rng(2).choice(LONG, 512, replace=False))
    sparse = jnp.zeros_like(d_out).at[:, some].set(d_out[:, some])
    got = across("long", make_mesh(MESHES["context8"]), (q, k, v, sparse), None)

    pattern = mask.Mask(jnp.asarray(some)[None], jnp.arange(LONG)[None])
    one = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    full = values_and_gradients(
        layers.attend, one, q[:, some], k, v, d_out[:, some], pattern
    )
    assert np.abs(np.delete(got["q"], some, axis=1)).max() == 0
    got |= {name: got[name][:, some] for name in ("out", "q")}
    require_close(got, full, relative=1e-5)


@pytest.mark.parametrize("form", [RingAttention, GatheredAttention])
def test_memory_grows_with_the_length_not_with_its_square(form):
    """Of forward and backward pass, as compiled for eight devices."""
    mesh = make_mesh(MESHES["context8"])
    attend = form(rules=RULES, mesh=mesh)

    def temporary_bytes(length):
        def weighed(q, k, v):
            pattern = mask.causal(length, positions=placement(length, 8)[None])
            return jnp.sum(attend(q, k, v, pattern) ** 2)

        sharding = jax.NamedSharding(mesh, jax.P(None, "context"))
        shapes = [
            jax.ShapeDtypeStruct((1, length, heads, H), np.float32, sharding=sharding)
            for heads in (2, 1, 1)
        ]
        with jax.set_mesh(mesh):
            run = jax.jit(jax.grad(weighed, argnums=(0, 1, 2)))
            return run.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    short, long = temporary_bytes(LONG // 4), temporary_bytes(LONG)
    assert long < 4.5 * short
    # The scores of one device alone, of its own keys alone, would be more.
    assert long < 2 * (LONG // 8) ** 2 * 4


@pytest.mark.plan
def test_on_a_tpu_the_next_keys_are_on_their_way_while_these_are_read():
    """In the compiled schedule: sent, then the loop over tiles, then received."""
    mesh = make_mesh(MESHES["context8"], devices(parse("v5p:2x2x2")))
    attend = RingAttention(rules=RULES, mesh=mesh)

    def weighed(q, k, v):
        pattern = mask.causal(LONG, positions=placement(LONG, 8)[None])
        return jnp.sum(attend(q, k, v, pattern).astype(jnp.float32) ** 2)

    sharding = jax.NamedSharding(mesh, jax.P(None, "context"))
    shape = jax.ShapeDtypeStruct((1, LONG, 4, 128), jnp.bfloat16, sharding=sharding)
    with jax.set_mesh(mesh):
        run = jax.jit(jax.grad(weighed, argnums=(0, 1, 2)))
        program = run.lower(shape, shape, shape).compile().as_text()
    kinds = r" (collective-permute-start|while|collective-permute-done)\("
    around = []
    for computation in program.split("\n\n"):
        found = re.findall(kinds, computation)
        if "while" in found and "ENTRY" not in computation and len(found) > 1:
            around.append(found)
    # The loops around the ring, forward and backward: what the next step needs has
    # left before the tiles of this one, and is not waited for until after them.
    assert len(around) == 2
    for found in around:
        tiles = found.index("while")
        assert "collective-permute-start" in found[:tiles]
        assert "collective-permute-done" not in found[:tiles]
