"""From logits to the next token: the arithmetic of config/sampling.py.

Shape suffixes: B batch, V vocabulary.
"""

import dataclasses
from typing import Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from llama_jax.config.sampling import Greedy, MinP, Sampler, TopK, TopP
from llama_jax.errors import GenerationError


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


def draw(
    rule: Rule, logits_BV: Float[Array, "B V"], key_B: Key[Array, " B"]
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """The next token of each row and its log-probability.

    The log-probability is the model's own, log softmax(logits): neither the
    temperature nor the choice of tokens moves it, as in Meta's `generate`.

    Args:
      rule: how to choose.
      logits_BV: float32; -inf for a token that must not come.
      key_B: a row's key; rows do not share randomness.
    """
    if rule.kind == "greedy":
        token_B = jnp.argmax(logits_BV, axis=-1)
    else:
        token_B = jax.vmap(jax.random.categorical)(key_B, filtered(rule, logits_BV))
    logprob_BV = jax.nn.log_softmax(logits_BV)
    logprob_B = jnp.take_along_axis(logprob_BV, token_B[:, None], axis=-1)[:, 0]
    return token_B.astype(jnp.int32), logprob_B


def filtered(rule: Rule, logits_BV: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """Logits of the distribution to draw from: scaled, -inf for what is left out.

    In the order of the vocabulary, so that the noise of a draw belongs to a token and
    not to its rank, which rounding may change.
    """
    # The best logit becomes 0 first: no temperature, however low, overflows it.
    best_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    scaled_BV = (logits_BV - best_B1) / rule.temperature
    return jnp.where(_kept(rule, scaled_BV), scaled_BV, -jnp.inf)


def _kept(rule: Rule, scaled_BV: Float[Array, "B V"]) -> Bool[Array, "B V"]:
    if rule.kind == "min_p":
        # exp(scaled) is the probability as a share of the highest.
        return jnp.exp(scaled_BV) >= rule.bound
    # A stable sort: of equally probable tokens, those with lower ids come first.
    order_BV = jnp.argsort(-scaled_BV, axis=-1, stable=True)
    if rule.kind == "top_k":
        kept_BV = jnp.broadcast_to(
            jnp.arange(order_BV.shape[-1]) < rule.bound, order_BV.shape
        )
    else:
        probs_BV = jnp.take_along_axis(jax.nn.softmax(scaled_BV), order_BV, axis=-1)
        # Meta's `sample_top_p`: a token stays while those before it sum to at most p.
        kept_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV <= rule.bound
    return jnp.take_along_axis(kept_BV, jnp.argsort(order_BV, axis=-1), axis=-1)
