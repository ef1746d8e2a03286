"""The engine: rows of ids in, rows of ids out, with programs that are compiled once.

Rows are padded to few sizes; long prompts are read in chunks; the cache is kept from
one request to the next. What texts and samplers are is the business of `generator.py`.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int, UInt32

from llama_jax.build import ShardedLlama
from llama_jax.errors import GenerationError
from llama_jax.generate import decode as programs
from llama_jax.generate.decode import Cache, Choice, DecodeState
from llama_jax.generate.rows import chunks, num_rows_for, padded
from llama_jax.model.cache import CACHE_AXES
from llama_jax.model.decoder import Decoder, Weights
from llama_jax.model.int8 import Quantized
from sharding.axes import AxisNames

Mask = Bool[np.ndarray, "B V"]

# Slots of the cache that attention reads at the least: fewer sizes to compile than
# there would be with less, and little to read.
_LEAST_SLOTS = 256


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a request.

    Attributes:
      ids: its prompt.
      limit: the length at which it ends at the latest.
      seed: 64 bits that decide its draws, as two words.
    """

    ids: Sequence[int]
    limit: int
    seed: tuple[int, int] = (0, 0)


def require_slots(slots: int | None, max_length: int) -> int:
    """The positions that a row has room for, all of the context if none are given.

    Raises:
      GenerationError: it is no number of positions that the model has.
    """
    if slots is None:
        return max_length
    if type(slots) is not int or not 2 <= slots <= max_length:
        raise GenerationError(
            f"cache_length is {slots!r}: give the positions of a row, 2 to "
            f"{max_length}, which is the model's max_length."
        )
    return slots


def decoder(sharded: ShardedLlama) -> Decoder:
    """The form of a model that generation compiles."""
    return Decoder(
        config=sharded.config,
        constrain=sharded.model.constrain,
        dtype=sharded.model.dtype,
        kv_copies=sharded.model.kv_copies,
        mlp_parts=sharded.mlp_parts,
        least_slots=_LEAST_SLOTS,
    )


class Engine:
    """Runs one model.

    Args:
      sharded: the model and its mesh, with rules that split no sequence.
      weights: of the model, in the form for generation.
      slots: positions of a row at most; by default the model's `max_length`.
      cache_dtype: of keys and values; by default what the arithmetic is done in.

    Raises:
      GenerationError: `slots` is no number of positions that the model has.
    """

    def __init__(
        self,
        sharded: ShardedLlama,
        weights: Weights,
        *,
        slots: int | None = None,
        cache_dtype: str | None = None,
    ) -> None:
        self.sharded = sharded
        self.weights = weights
        self.slots = require_slots(slots, sharded.config.max_length)
        self.cache_dtype = jnp.dtype(cache_dtype or sharded.model.dtype)
        self.decoder = decoder(sharded)
        # Of the request before: to fill a new one with zeros takes longer than a
        # short request.
        self._spare: Cache | None = None

    def read(
        self,
        rows: Sequence[Row],
        *,
        state: DecodeState | None = None,
        known: int = 0,
    ) -> DecodeState:
        """Read prompts, all but their first `known` tokens.

        Args:
          rows: the prompts.
          state: of a request whose cache has those tokens; it is consumed. None
            begins with an empty cache.
          known: tokens, the same in all rows, that need not be read again.
        """
        lengths = [len(row.ids) for row in rows]
        assert max(lengths) < self.slots and known < min(lengths), (lengths, known)
        cache = self._cache(len(rows)) if state is None else state.cache
        num_rows = cache[0].keys.shape[0]
        with jax.set_mesh(self.sharded.mesh):
            state = self._named(
                programs.begin(
                    self.decoder,
                    cache,
                    padded([row.ids for row in rows], num_rows, self.slots),
                    *_columns(rows, num_rows),
                )
            )
            for start, num_new in chunks(known, max(lengths), self.slots):
                state = self._named(
                    programs.prefill(
                        self.decoder,
                        self.weights,
                        state,
                        np.int32(start),
                        num_new=num_new,
                    )
                )
        return state

    def spread(
        self, state: DecodeState, rows: Sequence[Row], copied: Sequence[int]
    ) -> DecodeState:
        """`rows`, each beginning as a copy of a row that was read, by its number."""
        num_rows = num_rows_for(self.sharded, len(rows))
        _, limits, seeds = _columns(rows, num_rows)
        numbers = np.zeros(num_rows, np.int32)
        numbers[: len(rows)] = copied
        with jax.set_mesh(self.sharded.mesh):
            return self._named(
                programs.spread(self.decoder, state, numbers, limits, seeds)
            )

    def write_first(
        self, state: DecodeState, choice: Choice, *, allowed: Mask | None = None
    ) -> DecodeState:
        """Write the first token of each row that was read; the state is consumed.

        Args:
          state: what `read` or `spread` gave.
          choice: how tokens are chosen.
          allowed: bool[rows, V], the tokens that may come.
        """
        allowed = _for_all_rows(allowed, len(state.done))
        with jax.set_mesh(self.sharded.mesh):
            return self._named(
                programs.choose_first(self.decoder, state, choice, allowed)
            )

    def write(
        self,
        state: DecodeState,
        choice: Choice,
        *,
        num_tokens: int,
        halted: Sequence[int] = (),
        allowed: Mask | None = None,
    ) -> DecodeState:
        """Write up to `num_tokens` more tokens to each row; the state is consumed.

        Args:
          state: what `write_first` or `write` gave.
          choice: how tokens are chosen.
          num_tokens: at least 1.
          halted: numbers of rows that are to grow no more.
          allowed: bool[rows, V], the tokens that may come.
        """
        halts = np.zeros(len(state.done), bool)
        halts[list(halted)] = True
        allowed = _for_all_rows(allowed, len(halts))
        with jax.set_mesh(self.sharded.mesh):
            return self._named(
                programs.decode(
                    self.decoder,
                    self.weights,
                    state,
                    choice,
                    np.int32(num_tokens),
                    halts,
                    allowed,
                )
            )

    @property
    def is_int8(self) -> bool:
        """Whether matrices are kept in eight bits."""
        return isinstance(self.weights.unembed, Quantized)

    def release(self, state: DecodeState) -> None:
        """The request is answered: the next may have its cache."""
        self._spare = state.cache

    def _named(self, state: DecodeState) -> DecodeState:
        """The same arrays, with the one name for their layout that programs know.

        On axes with one device many layouts are the same, and XLA returns any of them;
        but `jax.jit` traces a program again for each.
        """

        def named(x: jax.Array, axes: AxisNames) -> jax.Array:
            layout = self.sharded.sharding(*axes)
            if x.sharding == layout:
                return x
            # Not by `device_put`, which takes no layout with devices of other hosts.
            return jax.jit(_same, out_shardings=layout)(x)

        small = jax.tree.map(
            lambda x: named(x, ()), dataclasses.replace(state, cache=())
        )
        cache = jax.tree.map(lambda x: named(x, CACHE_AXES[: x.ndim]), state.cache)
        return dataclasses.replace(small, cache=cache)

    def _cache(self, num_rows: int) -> Cache:
        num_rows = num_rows_for(self.sharded, num_rows)
        spare, self._spare = self._spare, None
        if spare is not None and spare[0].keys.shape[0] == num_rows:
            return spare
        del spare
        with jax.set_mesh(self.sharded.mesh):
            return _empty_cache(self.decoder, num_rows, self.slots, self.cache_dtype)


def _same(x: jax.Array) -> jax.Array:
    return x


def _for_all_rows(allowed: Mask | None, num_rows: int) -> Mask | None:
    """With rows of padding, which may write anything."""
    if allowed is None:
        return None
    padding = np.ones((num_rows - len(allowed), allowed.shape[1]), bool)
    return np.concatenate([allowed, padding])


@functools.partial(jax.jit, static_argnames=("decoder", "num_rows", "slots", "dtype"))
def _empty_cache(
    decoder: Decoder, num_rows: int, slots: int, dtype: jnp.dtype
) -> Cache:
    return jax.tree.map(
        lambda x: decoder.constrain(x, *CACHE_AXES[: x.ndim]),
        decoder.empty_cache(num_rows, slots, dtype),
    )


def _columns(
    rows: Sequence[Row], num_rows: int
) -> tuple[Int[np.ndarray, " B"], Int[np.ndarray, " B"], UInt32[np.ndarray, "B 2"]]:
    """Lengths, limits and seeds; rows of padding have one token, and are done."""
    lengths = np.ones(num_rows, np.int32)
    limits = np.zeros(num_rows, np.int32)
    seeds = np.zeros((num_rows, 2), np.uint32)
    for number, row in enumerate(rows):
        lengths[number] = len(row.ids)
        limits[number] = row.limit
        seeds[number] = row.seed
    return lengths, limits, seeds
