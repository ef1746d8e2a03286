"""From logits to the next token: the arithmetic of config/sampling.py.

Shape suffixes: B batch, V vocabulary, C parts of it, c the tokens of one part,
F the best few.
"""

import dataclasses
from typing import Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from llama_jax.config.sampling import Greedy, MinP, Penalties, Sampler, TopK, TopP
from llama_jax.errors import GenerationError

# Tokens in a part, and tokens that are sorted.
_PART = 128
_FEW = 256


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rule:
    """A sampler as a program takes it: the kind is compiled in, the numbers are not.

    Attributes:
      kind: what is left out before drawing; "greedy" draws nothing.
      bound: the sampler's k or p.
      temperature: divides the logits; above 0.
    """

    kind: Literal["greedy", "top_k", "top_p", "min_p"] = dataclasses.field(
        metadata={"static": True}
    )
    bound: float
    temperature: float

    @classmethod
    def of(cls, sampler: Sampler) -> Self:
        """The rule of a sampler; greedy where its temperature is 0 in float32.

        Raises:
          GenerationError: it is no sampler.
        """
        match sampler:
            case TopK(bound, temperature=temperature):
                kind = "top_k"
            case TopP(bound, temperature=temperature):
                kind = "top_p"
            case MinP(bound, temperature=temperature):
                kind = "min_p"
            case Greedy():
                kind, bound, temperature = "greedy", 0, 0
            case _:
                raise GenerationError(
                    f"sampler is {sampler!r:.60}: give Greedy(), TopP(p, "
                    "temperature=), TopK(k, temperature=) or MinP(p, temperature=)."
                )
        if temperature < np.finfo(np.float32).tiny:
            kind, bound, temperature = "greedy", 0, 1
        return cls(kind, float(bound), float(temperature))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PenaltyRule:
    """`Penalties` as a program takes them: traced numbers, all three of them."""

    repetition: float
    presence: float
    frequency: float

    @classmethod
    def of(cls, penalties: Penalties | None) -> Self | None:
        """None where nothing would change, so that nothing is computed."""
        if penalties is None or penalties == Penalties():
            return None
        return cls(*map(float, dataclasses.astuple(penalties)))


def draw(
    rule: Rule, logits_BV: Float[Array, "B V"], key_B: Key[Array, " B"]
) -> Int[Array, " B"]:
    """The next token of each row.

    Args:
      rule: how to choose.
      logits_BV: float32; -inf for a token that must not come.
      key_B: a row's key; rows do not share randomness.
    """
    if rule.kind == "greedy":
        return _best(logits_BV)
    uniform_B = jax.vmap(jax.random.uniform)(key_B)
    return _place(jnp.exp(filtered(rule, logits_BV)), uniform_B)


def _best(logits_BV: Float[Array, "B V"]) -> Array:
    """The token with the highest logit, of equals the first: int32[B].

    First among the best of parts, then within the part: `argmax` over a vocabulary
    takes ten times as long on a CPU.
    """
    logits_BCc = _in_parts(logits_BV, -jnp.inf)
    part_B = jnp.argmax(jnp.max(logits_BCc, axis=-1), axis=-1)
    logits_Bc = jnp.take_along_axis(logits_BCc, part_B[:, None, None], axis=1)[:, 0]
    return (part_B * _PART + jnp.argmax(logits_Bc, axis=-1)).astype(jnp.int32)


def _in_parts(x_BV: Float[Array, "B V"], padding: float) -> Float[Array, "B C c"]:
    x_BV = jnp.pad(x_BV, ((0, 0), (0, -x_BV.shape[1] % _PART)), constant_values=padding)
    return x_BV.reshape(len(x_BV), -1, _PART)


def _place(weights_BV: Float[Array, "B V"], share_B: Float[Array, " B"]) -> Array:
    """Where in each row this share of its sum is reached: int32[B].

    One number decides a draw, with the vocabulary in its order, whatever is probable.
    Sums of parts come first, since a running sum over all is slow on any device.
    """
    weights_BCc = _in_parts(weights_BV, 0)
    sums_BC = jnp.cumsum(jnp.sum(weights_BCc, axis=-1), axis=-1)
    target_B1 = share_B[:, None] * sums_BC[:, -1:]
    part_B = jnp.sum(sums_BC <= target_B1, axis=-1)
    rest_B1 = target_B1 - _at(jnp.pad(sums_BC, ((0, 0), (1, 0))), part_B)
    weights_Bc = jnp.take_along_axis(weights_BCc, part_B[:, None, None], axis=1)[:, 0]
    place_B = jnp.sum(jnp.cumsum(weights_Bc, axis=-1) <= rest_B1, axis=-1)
    # The same numbers, added otherwise: their sum may fall short by a rounding.
    last_B = jnp.max(jnp.where(weights_Bc > 0, jnp.arange(_PART), 0), axis=-1)
    return (part_B * _PART + jnp.minimum(place_B, last_B)).astype(jnp.int32)


def _at(x_BC: Float[Array, "B C"], index_B: Int[Array, " B"]) -> Float[Array, "B 1"]:
    return jnp.take_along_axis(x_BC, index_B[:, None], axis=-1)


def logprob(
    logits_BV: Float[Array, "B V"], token_B: Int[Array, " B"]
) -> Float[Array, " B"]:
    """The model's own log-probability of each row's token, log softmax(logits).

    Neither penalties nor the temperature nor the choice of tokens moves it, as in
    Meta's `generate`.
    """
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
    return chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)


def penalised(
    penalties: PenaltyRule,
    logits_BV: Float[Array, "B V"],
    tokens_BS: Int[Array, "B S"],
    prompt_B: Int[Array, " B"],
    length_B: Int[Array, " B"],
) -> Float[Array, "B V"]:
    """Logits after what `Penalties` takes from those of tokens that were there.

    Args:
      penalties: how much.
      logits_BV: the model's.
      tokens_BS: rows of prompt and answer.
      prompt_B: tokens of each row's prompt.
      length_B: tokens of each row so far.
    """
    slot_S = jnp.arange(tokens_BS.shape[1])
    rows_B1 = jnp.arange(tokens_BS.shape[0])[:, None]

    def count(of_BS: Bool[Array, "B S"]) -> Int[Array, "B V"]:
        zeros_BV = jnp.zeros(logits_BV.shape, jnp.int32)
        return zeros_BV.at[rows_B1, tokens_BS].add(of_BS.astype(jnp.int32))

    is_there_BS = slot_S < length_B[:, None]
    times_BV = count(is_there_BS & (slot_S >= prompt_B[:, None]))
    repeated_BV = jnp.where(
        logits_BV > 0,
        logits_BV / penalties.repetition,
        logits_BV * penalties.repetition,
    )
    moved_BV = jnp.where(count(is_there_BS) > 0, repeated_BV, logits_BV)
    moved_BV -= penalties.presence * (times_BV > 0)
    return moved_BV - penalties.frequency * times_BV


def filtered(rule: Rule, logits_BV: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """Logits of the distribution to draw from: scaled, -inf for what is left out."""
    # The best logit becomes 0 first: no temperature, however low, overflows it.
    best_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    scaled_BV = (logits_BV - best_B1) / rule.temperature
    return jnp.where(_kept(rule, scaled_BV), scaled_BV, -jnp.inf)


def _kept(rule: Rule, scaled_BV: Float[Array, "B V"]) -> Bool[Array, "B V"]:
    if rule.kind == "min_p":
        # exp(scaled) is the probability as a share of the highest.
        return jnp.exp(scaled_BV) >= rule.bound
    weights_BV = jnp.ones_like(scaled_BV)
    limit = rule.bound - 1
    if rule.kind == "top_p":
        # Meta's `sample_top_p`: a token stays while those before it sum to at most p.
        weights_BV, limit = jax.nn.softmax(scaled_BV), rule.bound
    # Nearly always the best few are all that stay, and sorting those is quick.
    num_few = min(_FEW, scaled_BV.shape[1])
    _, id_BF = jax.lax.top_k(scaled_BV, num_few)
    weight_BF = jnp.take_along_axis(weights_BV, id_BF, axis=1)
    stays_BF = jnp.cumsum(weight_BF, axis=1) - weight_BF <= limit
    rows_B1 = jnp.arange(len(id_BF))[:, None]
    kept_BV = jax.lax.cond(
        jnp.any(stays_BF[:, -1]) & (num_few < scaled_BV.shape[1]),
        lambda: _leading(scaled_BV, weights_BV, limit),
        lambda: jnp.zeros(scaled_BV.shape, bool).at[rows_B1, id_BF].set(stays_BF),
    )
    # Sums are rounded, but 1 leaves every token.
    return kept_BV | ((rule.kind == "top_p") & (jnp.asarray(rule.bound) >= 1))


def _leading(
    scaled_BV: Float[Array, "B V"], weights_BV: Float[Array, "B V"], limit: float
) -> Bool[Array, "B V"]:
    """The tokens such that all better ones together weigh at most `limit`.

    Of equally good tokens, those with lower ids are better. Found by bisection, since
    to sort a vocabulary takes as long as a small model.

    Args:
      scaled_BV: at most 0; the higher the better.
      weights_BV: the same for equally good tokens.
      limit: at least 0.
    """
    # Floats that are not negative are ordered as their bits are.
    badness_BV = jax.lax.bitcast_convert_type(jnp.abs(scaled_BV), jnp.int32)

    def better(than_B1: Int[Array, "B 1"]) -> Float[Array, "B 1"]:
        weights = jnp.where(badness_BV < than_B1, weights_BV, 0)
        return jnp.sum(weights, axis=-1, keepdims=True)

    def with_bit(number: Array, found_B1: Array) -> Array:
        tried_B1 = found_B1 | (jnp.int32(1) << (30 - number))
        return jnp.where(better(tried_B1) <= limit, tried_B1, found_B1)

    zero_B1 = jnp.zeros((len(scaled_BV), 1), jnp.int32)
    worst_B1 = jax.lax.fori_loop(0, 31, with_bit, zero_B1)
    is_worst_BV = badness_BV == worst_B1
    weight_B1 = jnp.max(jnp.where(is_worst_BV, weights_BV, 0), axis=-1, keepdims=True)
    # What weighs nothing all stays.
    room_B1 = (limit - better(worst_B1)) / jnp.where(weight_B1 > 0, weight_B1, 1)
    room_B1 = jnp.where(weight_B1 > 0, jnp.floor(room_B1) + 1, jnp.inf)
    is_crowded = jnp.any(jnp.sum(is_worst_BV, axis=-1, keepdims=True) > room_B1)
    is_first_BV = jax.lax.cond(
        is_crowded,
        lambda: jnp.cumsum(is_worst_BV, axis=-1) <= room_B1,
        lambda: jnp.ones_like(is_worst_BV),
    )
    return (badness_BV < worst_B1) | (is_worst_BV & is_first_BV)
