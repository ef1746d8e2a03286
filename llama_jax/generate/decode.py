"""The two programs of generation: `prefill` reads prompts, `decode` writes on.

Both work on one `DecodeState`, and run inside `jax.set_mesh`. Position, slot of the
cache and index into `tokens` are the same number. What changes from request to request
is traced; only sizes and the kind of sampler are compiled in. Shape suffixes: B batch,
T prompt position, S slot, D model width, V vocabulary.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from llama_jax.generate import sample
from llama_jax.model import KVCache, Llama
from llama_jax.model.cache import CACHE_AXES
from sharding.axes import Tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """A batch of rows, each somewhere between its prompt and its end.

    The cache is split over the mesh; the rest is small, and whole on every device, so
    that every host can read it.

    Attributes:
      cache: keys and values of all tokens but each row's last.
      tokens: int32[B, S], prompt and what was written after it, up to `length`.
      logprobs: float32[B, S], of the tokens written; elsewhere it means nothing.
      length: int32[B], tokens of the row so far.
      limit: int32[B], the length at which the row ends at the latest.
      done: bool[B], true for a row that has ended and grows no more.
      key: key[B], a row's randomness; each position folds itself in.
    """

    cache: KVCache
    tokens: Int[Array, "B S"]
    logprobs: Float[Array, "B S"]
    length: Int[Array, " B"]
    limit: Int[Array, " B"]
    done: Bool[Array, " B"]
    key: Key[Array, " B"]


class Vocabulary(NamedTuple):
    """What the programs know of the tokenizer.

    Attributes:
      num_pieces: ids from here on are padding of the embedding, and never come.
      eos_id: the token that ends a row.
    """

    num_pieces: int
    eos_id: int


@functools.partial(jax.jit, static_argnames=("model", "slots"))
def prefill(
    model: Llama,
    params: Tree,
    tokens_BT: Int[Array, "B T"],
    length_B: Int[Array, " B"],
    limit_B: Int[Array, " B"],
    seed_B2: UInt32[Array, "B 2"],
    rule: sample.Rule,
    vocabulary: Vocabulary,
    *,
    slots: int,
) -> DecodeState:
    """Read the prompts at once and choose each row's first new token.

    Args:
      model: on the mesh that is set.
      params: its parameters.
      tokens_BT: the prompts, padded at their ends with any id.
      length_B: tokens of each prompt, at least 1.
      limit_B: longest length of each row; a row whose prompt has it writes nothing.
      seed_B2: 64 bits per row, which decide all its draws.
      rule: how tokens are chosen.
      vocabulary: what may come, and what ends a row.
      slots: size of the cache and of `tokens`; at least T and every limit.
    """
    num_rows, num_prompt = tokens_BT.shape
    cache = KVCache.empty(
        model.config,
        batch=num_rows,
        slots=slots,
        dtype=model.dtype,
        kv_copies=model.kv_copies,
    )
    # Padding is read too, into slots that no row sees before it has written there.
    x_BTD, cache = model.bind({"params": params}).extend(
        tokens_BT, _split(model, cache), jnp.zeros_like(length_B)
    )
    last_BTD = jnp.take_along_axis(x_BTD, (length_B - 1)[:, None, None], axis=1)
    state = DecodeState(
        cache=cache,
        tokens=jnp.pad(tokens_BT, ((0, 0), (0, slots - num_prompt))),
        logprobs=jnp.zeros((num_rows, slots), jnp.float32),
        length=length_B,
        limit=limit_B,
        done=length_B >= limit_B,
        key=jax.random.wrap_key_data(seed_B2, impl="threefry2x32"),
    )
    return _pin(model, _append(model, params, state, last_BTD, rule, vocabulary))


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def decode(
    model: Llama,
    params: Tree,
    state: DecodeState,
    rule: sample.Rule,
    vocabulary: Vocabulary,
    num_steps: Int[Array, ""],
) -> DecodeState:
    """Write up to `num_steps` more tokens to each row; stop when all are done.

    The state that is given is consumed: its memory becomes the result's.
    """

    def unfinished(carry: tuple[Int[Array, ""], DecodeState]) -> Bool[Array, ""]:
        step, state = carry
        return (step < num_steps) & ~jnp.all(state.done)

    def write_one(
        carry: tuple[Int[Array, ""], DecodeState],
    ) -> tuple[Int[Array, ""], DecodeState]:
        step, state = carry
        last_B = state.length - 1
        token_BT = jnp.take_along_axis(state.tokens, last_B[:, None], axis=1)
        x_BTD, cache = model.bind({"params": params}).extend(
            token_BT, state.cache, last_B
        )
        state = dataclasses.replace(state, cache=cache)
        return step + 1, _append(model, params, state, x_BTD, rule, vocabulary)

    _, state = jax.lax.while_loop(unfinished, write_one, (jnp.int32(0), state))
    return _pin(model, state)


def _append(
    model: Llama,
    params: Tree,
    state: DecodeState,
    last_BTD: Float[Array, "B 1 D"],
    rule: sample.Rule,
    vocabulary: Vocabulary,
) -> DecodeState:
    """The state with one more token in each row that is not done."""
    logits_BTV = model.bind({"params": params}).unembed(last_BTD)
    with jax.named_scope("sample"):
        is_piece_V = jnp.arange(logits_BTV.shape[-1]) < vocabulary.num_pieces
        logits_BV = jnp.where(is_piece_V, logits_BTV[:, 0], -jnp.inf)
        key_B = jax.vmap(jax.random.fold_in)(state.key, state.length)
        token_B, logprob_B = sample.draw(rule, logits_BV, key_B)
    rows_B = jnp.arange(token_B.shape[0])
    # A row that is done writes behind its end, again and again, or behind the last
    # slot, which is nowhere.
    slot_B = state.length
    length_B = slot_B + ~state.done
    ended_B = (token_B == vocabulary.eos_id) | (length_B >= state.limit)
    return dataclasses.replace(
        state,
        tokens=state.tokens.at[rows_B, slot_B].set(token_B, mode="drop"),
        logprobs=state.logprobs.at[rows_B, slot_B].set(logprob_B, mode="drop"),
        length=length_B,
        done=state.done | ended_B,
    )


def _pin(model: Llama, state: DecodeState) -> DecodeState:
    """The state laid out as its docstring says; left alone, XLA would choose."""
    whole = jax.tree.map(lambda x: model.constrain(x, *[None] * x.ndim), state)
    return dataclasses.replace(whole, cache=_split(model, state.cache))


def _split(model: Llama, cache: KVCache) -> KVCache:
    return jax.tree.map(lambda x: model.constrain(x, *CACHE_AXES), cache)
