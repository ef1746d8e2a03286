"""The programs of generation: `begin`, `prefill`, `choose_first`, `decode`.

All work on one `DecodeState`, and run inside `jax.set_mesh`. Position, slot of the
cache and index into `tokens` are the same number. What changes from request to request
is traced; only sizes and the kind of sampler are compiled in, so that a server or a
notebook compiles `decode` once, and `prefill` once for each size of chunk. Shape
suffixes: B batch, T positions of a chunk, S slots, D model width, V vocabulary, E ends.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from llama_jax.generate import sample
from llama_jax.model.cache import CACHE_AXES, KVCache
from llama_jax.model.decoder import Decoder, Weights

Cache = tuple[KVCache, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """A batch of rows, each somewhere between its prompt and its end.

    The cache is split over the mesh; the rest is small, and whole on every device, so
    that every host can read it.

    Attributes:
      cache: of each layer, keys and values of all tokens but each row's last.
      tokens: int32[B, S], prompt and what was written after it, up to `length`.
      logprobs: float32[B, S], of the tokens written; elsewhere it means nothing.
      logits: float32[B, V], of the token after each prompt, once that is read.
      prompt: int32[B], tokens of each prompt.
      length: int32[B], tokens of the row so far.
      limit: int32[B], the length at which the row ends at the latest.
      done: bool[B], true for a row that has ended and grows no more.
      key: key[B], a row's randomness; each position folds itself in.
    """

    cache: Cache
    tokens: Int[Array, "B S"]
    logprobs: Float[Array, "B S"]
    logits: Float[Array, "B V"]
    prompt: Int[Array, " B"]
    length: Int[Array, " B"]
    limit: Int[Array, " B"]
    done: Bool[Array, " B"]
    key: Key[Array, " B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Choice:
    """How `decode` chooses, and what ends a row.

    Attributes:
      rule: the sampler.
      num_pieces: ids from here on are padding of the embedding, and never come.
      ends: int32[E], tokens that end a row; -1 is none.
      penalties: None changes no logit.
    """

    rule: sample.Rule
    num_pieces: int
    ends: Int[Array | np.ndarray, " E"]
    penalties: sample.PenaltyRule | None = None


@functools.partial(jax.jit, static_argnames="decoder", donate_argnames="cache")
def begin(
    decoder: Decoder,
    cache: Cache,
    tokens_BS: Int[Array, "B S"],
    prompt_B: Int[Array, " B"],
    limit_B: Int[Array, " B"],
    seed_B2: UInt32[Array, "B 2"],
) -> DecodeState:
    """A batch of prompts, of which nothing is read yet.

    Args:
      decoder: on the mesh that is set.
      cache: for B rows and S slots; what it holds does not matter.
      tokens_BS: the prompts, padded at their ends with any id.
      prompt_B: tokens of each, at least 1.
      limit_B: longest length of each row; a row whose prompt has it writes nothing.
      seed_B2: 64 bits per row, which decide all its draws.
    """
    num_rows, num_slots = tokens_BS.shape
    state = DecodeState(
        cache=cache,
        tokens=tokens_BS,
        logprobs=jnp.zeros((num_rows, num_slots), jnp.float32),
        logits=jnp.zeros((num_rows, decoder.config.vocab_size), jnp.float32),
        prompt=prompt_B,
        length=prompt_B,
        limit=limit_B,
        done=prompt_B >= limit_B,
        key=jax.random.wrap_key_data(seed_B2, impl="threefry2x32"),
    )
    return _pin(decoder, state)


@functools.partial(
    jax.jit, static_argnames=("decoder", "num_new"), donate_argnames="state"
)
def prefill(
    decoder: Decoder,
    weights: Weights,
    state: DecodeState,
    start: Int[Array, ""],
    *,
    num_new: int,
) -> DecodeState:
    """Read the prompts' tokens at start ... start + num_new - 1.

    Padding is read too, into slots that no row sees before it has written there. The
    logits of each prompt whose last token is among these are kept.
    """
    tokens_BT = jax.lax.dynamic_slice_in_dim(state.tokens, start, num_new, axis=1)
    last_B = state.prompt - 1 - start
    is_here_B = (last_B >= 0) & (last_B < num_new)
    x_B1D, cache = decoder.extend(
        weights,
        tokens_BT,
        state.cache,
        start,
        wanted_B=jnp.clip(last_B, 0, num_new - 1),
    )
    logits_BV = decoder.unembed(weights, x_B1D)[:, 0]
    state = dataclasses.replace(
        state,
        cache=cache,
        logits=jnp.where(is_here_B[:, None], logits_BV, state.logits),
    )
    return _pin(decoder, state)


@functools.partial(jax.jit, static_argnames="decoder")
def spread(
    decoder: Decoder,
    state: DecodeState,
    row_R: Int[Array, " R"],
    limit_R: Int[Array, " R"],
    seed_R2: UInt32[Array, "R 2"],
) -> DecodeState:
    """A batch whose rows begin as copies of rows, all of them read.

    Args:
      decoder: on the mesh that is set.
      state: after `prefill`.
      row_R: which row each is a copy of.
      limit_R: as in `begin`, of the copies.
      seed_R2: likewise.
    """
    cache, tokens, logprobs, logits, prompt = jax.tree.map(
        lambda x: x[row_R],
        (state.cache, state.tokens, state.logprobs, state.logits, state.prompt),
    )
    copies = DecodeState(
        cache=cache,
        tokens=tokens,
        logprobs=logprobs,
        logits=logits,
        prompt=prompt,
        length=prompt,
        limit=limit_R,
        done=prompt >= limit_R,
        key=jax.random.wrap_key_data(seed_R2, impl="threefry2x32"),
    )
    return _pin(decoder, copies)


@functools.partial(jax.jit, static_argnames="decoder", donate_argnames="state")
def choose_first(
    decoder: Decoder,
    state: DecodeState,
    choice: Choice,
    allowed_BV: Bool[Array, "B V"] | None = None,
) -> DecodeState:
    """Write the first token of each row, from the logits of its prompt.

    A program of its own, so that it need not wait for `decode` to be compiled.

    Args:
      decoder: on the mesh that is set.
      state: after `prefill`; it is consumed.
      choice: how tokens are chosen.
      allowed_BV: the tokens that may come; None allows all.
    """
    return _pin(decoder, _choose(state, state.logits, choice, allowed_BV))


@functools.partial(jax.jit, static_argnames="decoder", donate_argnames="state")
def decode(
    decoder: Decoder,
    weights: Weights,
    state: DecodeState,
    choice: Choice,
    num_tokens: Int[Array, ""],
    halted_B: Bool[Array, " B"],
    allowed_BV: Bool[Array, "B V"] | None = None,
) -> DecodeState:
    """Write up to `num_tokens` more tokens to each row; stop when all are done.

    The state that is given is consumed: its memory becomes the result's.

    Args:
      decoder: on the mesh that is set.
      weights: of the model.
      state: after `choose_first`, or another `decode`.
      choice: how tokens are chosen.
      num_tokens: at least 1.
      halted_B: rows that are done from now on, whatever they were.
      allowed_BV: the tokens that may come; None allows all.
    """
    state = dataclasses.replace(state, done=state.done | halted_B)

    def unfinished(carry: tuple[Int[Array, ""], DecodeState]) -> Bool[Array, ""]:
        step, state = carry
        return (step < num_tokens) & ~jnp.all(state.done)

    def write_one(
        carry: tuple[Int[Array, ""], DecodeState],
    ) -> tuple[Int[Array, ""], DecodeState]:
        step, state = carry
        last_B = state.length - 1
        token_BT = jnp.take_along_axis(state.tokens, last_B[:, None], axis=1)
        x_BTD, cache = decoder.extend(weights, token_BT, state.cache, last_B)
        logits_BV = decoder.unembed(weights, x_BTD)[:, 0]
        state = dataclasses.replace(state, cache=cache)
        return step + 1, _choose(state, logits_BV, choice, allowed_BV)

    _, state = jax.lax.while_loop(unfinished, write_one, (jnp.int32(0), state))
    return _pin(decoder, state)


def _choose(
    state: DecodeState,
    logits_BV: Float[Array, "B V"],
    choice: Choice,
    allowed_BV: Bool[Array, "B V"] | None,
) -> DecodeState:
    """The state with one more token in each row that is not done."""
    with jax.named_scope("sample"):
        may_come_V = jnp.arange(logits_BV.shape[-1]) < choice.num_pieces
        may_come_BV = may_come_V if allowed_BV is None else may_come_V & allowed_BV
        key_B = jax.vmap(jax.random.fold_in)(state.key, state.length)
        wanted_BV = logits_BV
        if choice.penalties is not None:
            wanted_BV = sample.penalised(
                choice.penalties, logits_BV, state.tokens, state.prompt, state.length
            )
        token_B = sample.draw(
            choice.rule, jnp.where(may_come_BV, wanted_BV, -jnp.inf), key_B
        )
        logprob_B = sample.logprob(jnp.where(may_come_V, logits_BV, -jnp.inf), token_B)
    rows_B = jnp.arange(token_B.shape[0])
    # A row that is done writes behind its end, again and again, or behind the last
    # slot, which is nowhere.
    slot_B = state.length
    length_B = slot_B + ~state.done
    is_end_B = jnp.any(token_B[:, None] == choice.ends, axis=1)
    return dataclasses.replace(
        state,
        tokens=state.tokens.at[rows_B, slot_B].set(token_B, mode="drop"),
        logprobs=state.logprobs.at[rows_B, slot_B].set(logprob_B, mode="drop"),
        length=length_B,
        done=state.done | is_end_B | (length_B >= state.limit),
    )


def _pin(decoder: Decoder, state: DecodeState) -> DecodeState:
    """The state laid out as its docstring says; left alone, XLA would choose."""
    whole = jax.tree.map(
        lambda x: decoder.constrain(x, *[None] * x.ndim),
        dataclasses.replace(state, cache=()),
    )
    cache = jax.tree.map(
        lambda x: decoder.constrain(x, *CACHE_AXES[: x.ndim]), state.cache
    )
    return dataclasses.replace(whole, cache=cache)
