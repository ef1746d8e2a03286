"""From parameters to the weights that generation reads, layer by layer, and back.

`model/decoder.py` says what their form is, and why. Of what comes from a checkpoint, no
more than one layer is held in both forms.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.build import ShardedLlama
from llama_jax.checkpoint.params import load_leaves
from llama_jax.config import LlamaConfig
from llama_jax.model.count import abstract_params
from llama_jax.model.decoder import LAYER_AXES, Layer, Weights
from llama_jax.model.int8 import Numbers, Quantized
from sharding import axes
from sharding.axes import AxisNames, Tree

# A part of the parameters by its name: "blocks" of one layer, or one of the others,
# which have no layers.
_Part = Callable[[str, int | None], Tree]


def from_params(sharded: ShardedLlama, params: Tree, *, int8: bool) -> Weights:
    """The weights of parameters in memory, which stay as they are.

    Args:
      sharded: the model and its mesh.
      params: laid out as `sharded.param_shardings` says.
      int8: whether matrices are kept in eight bits; embeddings and norms never are.
    """

    def part(name: str, layer: int | None) -> Tree:
        if layer is None:
            return params[name]
        return jax.tree.map(lambda leaf: leaf[layer], params[name])

    return _gathered(sharded, part, int8=int8)


def from_checkpoint(
    sharded: ShardedLlama,
    read: Callable[..., np.ndarray],
    *,
    dtype: jnp.dtype,
    int8: bool,
    watch: Callable[[int, int], None],
) -> Weights:
    """The weights of a checkpoint, each host reading only what its devices hold.

    Args:
      sharded: the model and its mesh.
      read: the checkpoint's method: a leaf by its path, or the part at an index.
      dtype: of the weights, before any become int8.
      int8: as `from_params`.
      watch: told the bytes of parameters that are done, and those of all.
    """
    shapes, shardings = abstract_params(sharded.config), sharded.param_shardings
    total = _num_bytes(shapes, dtype)
    done = 0

    def part(name: str, layer: int | None) -> Tree:
        nonlocal done

        def read_part(
            path: str, index: tuple[slice, ...], *, dtype: jnp.dtype
        ) -> np.ndarray:
            if layer is None:
                return read(f"{name}/{path}", index, dtype=dtype)
            index = (slice(layer, layer + 1), *index)
            return read(f"{name}/{path}", index, dtype=dtype)[0]

        leaves, places = shapes[name], shardings[name]
        if layer is not None:
            leaves, places = _without_layers(leaves), _without_layers(places)
        loaded = load_leaves(read_part, leaves, places, dtype=dtype)
        done += _num_bytes(leaves, dtype)
        watch(done, total)
        return loaded

    return _gathered(sharded, part, int8=int8)


def abstract_weights(sharded: ShardedLlama, dtype: jnp.dtype, *, int8: bool) -> Weights:
    """Shape, type and place of all weights, for compiling without them."""

    def part(name: str, layer: int | None) -> Tree:
        leaves = abstract_params(sharded.config)[name]
        places = sharded.param_shardings[name]
        if layer is not None:
            leaves, places = _without_layers(leaves), _without_layers(places)
        return jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=place),
            leaves,
            places,
        )

    return _gathered(sharded, part, int8=int8, abstract=True)


def to_params(sharded: ShardedLlama, weights: Weights) -> Tree:
    """The parameters again: the same bits, or, from int8, what those stand for."""
    config, dtype = sharded.config, weights.embed.dtype

    def stacked(layers: tuple[Layer, ...]) -> Tree:
        blocks = [
            _from_layer(config, sharded.mlp_parts, layer, dtype) for layer in layers
        ]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)

    def kernel(rows_VD: Numbers) -> jax.Array:
        return _wide(rows_VD, dtype).T

    places = sharded.param_shardings
    with jax.set_mesh(sharded.mesh):
        return {
            "embed": {"table": weights.embed},
            "blocks": jax.jit(stacked, out_shardings=places["blocks"])(weights.layers),
            "final_norm": {"scale": weights.final_norm},
            "unembed": {
                "kernel": jax.jit(kernel, out_shardings=places["unembed"]["kernel"])(
                    weights.unembed
                )
            },
        }


def _gathered(
    sharded: ShardedLlama, part: _Part, *, int8: bool, abstract: bool = False
) -> Weights:
    def place(names: AxisNames) -> Any:
        whole = sharded.sharding(*names)
        if not (int8 and len(names) == 2):
            return whole
        # A `Quantized` of places, of the form that its arrays have.
        form = jax.eval_shape(Quantized.of, jax.ShapeDtypeStruct((1, 1), jnp.float32))
        return jax.tree.unflatten(
            jax.tree.structure(form), [whole, sharded.sharding(*names[:-1])]
        )

    def program(form: Callable[[Tree], Any], places: Any) -> Callable[[Tree], Any]:
        """`form`, its matrices in eight bits where wanted, laid out by `places`."""

        def kept(x: jax.Array) -> Numbers:
            return Quantized.of(x) if int8 and x.ndim == 2 else x

        run = jax.jit(lambda tree: jax.tree.map(kept, form(tree)), out_shardings=places)
        if not abstract:
            return run
        return lambda tree: jax.tree.map(
            lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
            jax.eval_shape(run, tree),
            places,
        )

    layer_places: dict[str, Any] = {name: place(of) for name, of in LAYER_AXES.items()}
    to_layer = functools.partial(_to_layer, sharded.model.kv_copies, sharded.mlp_parts)
    make_layer = program(to_layer, Layer(**layer_places))
    make_rows = program(_transposed, place((axes.VOCAB, axes.EMBED)))
    with jax.set_mesh(sharded.mesh):
        return Weights(
            embed=part("embed", None)["table"],
            layers=tuple(
                make_layer(part("blocks", number))
                for number in range(sharded.config.num_layers)
            ),
            final_norm=part("final_norm", None)["scale"],
            unembed=make_rows(part("unembed", None)["kernel"]),
        )


def _transposed(kernel: Any) -> jax.Array:
    return kernel.T


def _to_layer(copies: int, parts: int, block: Mapping[str, Any]) -> Layer:
    attention, mlp = block["attention"], block["mlp"]
    # A key/value head that several devices keep becomes as many, each of which fewer
    # query heads read.
    key_KHD, value_KHD = (
        jnp.repeat(attention[name].transpose(1, 2, 0), copies, axis=0)
        for name in ("key", "value")
    )
    D, _, H = attention["query"].shape
    query_KGHD = attention["query"].transpose(1, 2, 0).reshape(len(key_KHD), -1, H, D)
    rows_KAHD = jnp.concatenate(
        [query_KGHD, key_KHD[:, None], value_KHD[:, None]], axis=1
    )
    gate_up_P2FD = jnp.stack(
        [mlp[name].T.reshape(parts, -1, D) for name in ("gate", "up")], axis=1
    )
    return Layer(
        attention_norm=block["attention_norm"]["scale"],
        query_key_value=rows_KAHD.reshape(-1, D),
        out=attention["out"].reshape(-1, D).T,
        mlp_norm=block["mlp_norm"]["scale"],
        gate_up=gate_up_P2FD.reshape(-1, D),
        down=mlp["down"].T,
    )


def _from_layer(
    config: LlamaConfig, parts: int, layer: Layer, dtype: jnp.dtype
) -> Tree:
    D, N, K, H = config.dim, config.num_heads, config.num_kv_heads, config.head_dim
    wide = {
        field.name: _wide(getattr(layer, field.name), dtype)
        for field in dataclasses.fields(layer)
    }
    rows = wide["query_key_value"].reshape(-1, H, D)
    copies = (len(rows) - N) // (2 * K)
    rows_KAHD = rows.reshape(K * copies, -1, H, D)

    gate_up_P2FD = wide["gate_up"].reshape(parts, 2, -1, D)

    def heads(rows: jax.Array) -> jax.Array:
        return rows.reshape(-1, H, D).transpose(2, 0, 1)

    return {
        "attention_norm": {"scale": wide["attention_norm"]},
        "attention": {
            "query": heads(rows_KAHD[:, :-2]),
            "key": heads(rows_KAHD[::copies, -2]),
            "value": heads(rows_KAHD[::copies, -1]),
            "out": wide["out"].T.reshape(N, H, D),
        },
        "mlp_norm": {"scale": wide["mlp_norm"]},
        "mlp": {
            "gate": gate_up_P2FD[:, 0].reshape(-1, D).T,
            "up": gate_up_P2FD[:, 1].reshape(-1, D).T,
            "down": wide["down"].T,
        },
    }


def _wide(numbers: Numbers, dtype: jnp.dtype) -> jax.Array:
    return numbers.widened(dtype) if isinstance(numbers, Quantized) else numbers


def _without_layers(tree: Tree) -> Tree:
    """Of shapes or places of stacked leaves, those of one layer."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, jax.sharding.NamedSharding):
            return jax.sharding.NamedSharding(leaf.mesh, jax.P(*leaf.spec[1:]))
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)

    return jax.tree.map(one, tree)


def _num_bytes(shapes: Tree, dtype: jnp.dtype) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(shapes)) * dtype.itemsize
