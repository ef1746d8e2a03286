"""The arithmetic of RLHF, as pure functions of arrays (paper, section 3.2.3).

No model, no mesh: under `jax.jit` the arrays are global, and so is every sum. Shape
suffixes: B rows, T position in the order of the text. What stands at a
position concerns one token of the response: its log-probability, and the value of
what precedes it. A mask is positive there and 0 at prompts and padding; weights also
say how much. What is masked may be anything, NaN too: it reaches neither a result nor
a gradient.

The paper gives the reward. How a policy follows from it is PPO as published (Schulman
et al., arXiv 1707.06347), and our choice where the paper is silent.
"""

import math
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Mask: TypeAlias = Bool[Array, "B T"] | Float[Array, "B T"]
Sum: TypeAlias = Float[Array, ""]

# Added to a variance, ours: equal values become 0 rather than their rounding errors,
# and a spread of 0.1 or more is exact to six digits.
EPSILON = 1e-8


def combined_scores(
    safety_B: Float[Array, " B"],
    helpfulness_B: Float[Array, " B"],
    about_safety_B: Bool[Array, " B"],
    *,
    threshold: float,
) -> Float[Array, " B"]:
    """logit(Rc), Rc = Rs if the prompt is about safety or Rs < threshold, else Rh.

    With Rs = sigmoid(safety) and Rh = sigmoid(helpfulness). Sigmoid and logit undo one
    another, so this chooses among raw scores and clips none, however extreme.

    Args:
      safety_B: scores of the safety reward model, before the sigmoid.
      helpfulness_B: scores of the helpfulness reward model, before the sigmoid.
      about_safety_B: prompts that are there to elicit unsafe answers.
      threshold: a probability; the paper's is 0.15.
    """
    assert 0 < threshold < 1, threshold
    unsafe_B = safety_B < math.log(threshold / (1 - threshold))
    return jnp.where(about_safety_B | unsafe_B, safety_B, helpfulness_B)


def whiten(
    values: Float[Array, "..."], weights: Bool[Array, "..."] | Float[Array, "..."]
) -> Float[Array, "..."]:
    """(x - mean) / sqrt(variance + EPSILON), and 0 where the weight is 0.

    Mean and variance are weighted, over all rows, positions, devices and hosts (paper:
    "whiten"; the scope is ours). The variance is the population's, not a sample's.
    """
    assert values.shape == weights.shape, (values.shape, weights.shape)
    total = _sum(weights)
    total = jnp.where(total > 0, total, 1.0)
    centred = _kept(values, weights)
    # Twice: the second removes what the first mean lost by rounding.
    for _ in range(2):
        centred = _kept(centred - _sum(centred * weights) / total, weights)
    variance = _sum(centred**2 * weights) / total
    return centred / jnp.sqrt(variance + EPSILON)


def sampled_kl(
    logprobs_BT: Float[Array, "B T"],
    reference_BT: Float[Array, "B T"],
    mask_BT: Mask,
) -> Float[Array, "B T"]:
    """Estimate D_KL(pi || pi0) by log pi - log pi0 of tokens sampled from pi, in nats.

    Summed over a response it is an unbiased estimate for the prompt, if tokens are
    drawn from pi as it is: temperature 1, nothing cut off. A single one may be negative
    (Schulman's k1). The estimator is ours: the paper names the divergence only.
    """
    return _kept(logprobs_BT, mask_BT) - _kept(reference_BT, mask_BT)


def token_rewards(
    scores_B: Float[Array, " B"],
    kl_BT: Float[Array, "B T"],
    mask_BT: Mask,
    *,
    beta: float,
) -> Float[Array, "B T"]:
    """-beta * KL at each response token; plus the row's score at the last of them.

    Over a row they sum to R(g|p) = score - beta * D_KL (paper, section 3.2.3); spread
    over tokens so that each answers for its own part of the divergence (ours). A row
    without a response has no reward.

    Args:
      scores_B: whitened scores.
      kl_BT: of each token, `sampled_kl`.
      mask_BT: response tokens.
      beta: weight of the divergence; the paper's is 0.01 for 7B and 13B, 0.005 above.
    """
    position_T = jnp.arange(mask_BT.shape[1])
    last_B1 = jnp.max(jnp.where(mask_BT > 0, position_T, -1), axis=1, keepdims=True)
    at_end_BT = jnp.where(position_T == last_B1, scores_B[:, None], 0.0)
    return at_end_BT - beta * _kept(kl_BT, mask_BT)


def advantages_and_returns(
    rewards_BT: Float[Array, "B T"],
    values_BT: Float[Array, "B T"],
    mask_BT: Mask,
    *,
    gamma: float,
    lam: float,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Generalised advantage estimates; and returns, which are these plus the values.

    A_t = d_t + gamma lam A_(t+1), where d_t = r_t + gamma V_(t+1) - V_t and t + 1 is
    the row's next response token, past what is masked in between; after the last one V
    and A are 0. Both results are 0 where masked. From Schulman et al., arXiv
    1506.02438, equation 16, and 1707.06347, equations 11 and 12; the choice is ours.

    Args:
      rewards_BT: of each response token, `token_rewards`.
      values_BT: what the critic expects, of the tokens from this one on.
      mask_BT: response tokens.
      gamma: discount of the reward per token.
      lam: how far to trust rewards rather than values: at 1 these telescope away.
    """
    assert 0 <= gamma <= 1 and 0 <= lam <= 1, (gamma, lam)
    response_BT = mask_BT > 0
    rewards_BT, values_BT = _kept(rewards_BT, mask_BT), _kept(values_BT, mask_BT)

    def back(
        following: tuple[Array, Array], here: tuple[Array, Array, Array]
    ) -> tuple[tuple[Array, Array], Array]:
        next_value_B, next_advantage_B = following
        reward_B, value_B, response_B = here
        error_B = reward_B + gamma * next_value_B - value_B
        advantage_B = error_B + gamma * lam * next_advantage_B
        following = (
            jnp.where(response_B, value_B, next_value_B),
            jnp.where(response_B, advantage_B, next_advantage_B),
        )
        return following, jnp.where(response_B, advantage_B, 0.0)

    end_B = jnp.zeros_like(values_BT[:, 0])
    steps = rewards_BT.T, values_BT.T, response_BT.T
    _, advantages_TB = jax.lax.scan(back, (end_B, end_B), steps, reverse=True)
    return advantages_TB.T, advantages_TB.T + values_BT


class PolicySums(NamedTuple):
    """Weighted sums over response tokens; divided by `weight`, means.

    Attributes:
      loss: what to make small.
      weight: the sum of weights.
      clipped: tokens whose ratio is out of range, so that they have no gradient.
      kl: estimates of D_KL(old || new), none of them negative.
    """

    loss: Sum
    weight: Sum
    clipped: Sum
    kl: Sum


def clipped_policy_loss(
    logprobs_BT: Float[Array, "B T"],
    old_logprobs_BT: Float[Array, "B T"],
    advantages_BT: Float[Array, "B T"],
    weights_BT: Mask,
    *,
    clip: float,
) -> PolicySums:
    """Sum of -min(ratio A, clip(ratio, 1 - clip, 1 + clip) A), ratio = new / old.

    From arXiv 1707.06347, equation 7; the paper's clip is 0.2. The minimum bounds the
    ratio on one side, the advantage's sign says which. It is bounded as a logarithm,
    before exp, so that no overflow follows a token that is clipped anyway. The
    divergence is estimated by ratio - 1 - log ratio, whose mean over tokens of the old
    policy is D_KL(old || new) (Schulman's k3; ours).
    """
    assert 0 < clip < 1, clip
    log_ratio_BT = _kept(logprobs_BT, weights_BT) - _kept(old_logprobs_BT, weights_BT)
    advantages_BT = _kept(advantages_BT, weights_BT)
    bounded_BT = jnp.where(
        advantages_BT >= 0,
        jnp.minimum(log_ratio_BT, math.log1p(clip)),
        jnp.maximum(log_ratio_BT, math.log1p(-clip)),
    )
    kl_BT = jnp.expm1(log_ratio_BT) - log_ratio_BT
    return PolicySums(
        loss=-_sum(jnp.exp(bounded_BT) * advantages_BT * weights_BT),
        weight=_sum(weights_BT),
        clipped=_sum((bounded_BT != log_ratio_BT) * weights_BT),
        kl=_sum(kl_BT * weights_BT),
    )


class ValueSums(NamedTuple):
    """Weighted sums over response tokens; divided by `weight`, means.

    Attributes:
      loss: what to make small.
      weight: the sum of weights.
      clipped: tokens where the clipped error is the greater: they have no gradient.
    """

    loss: Sum
    weight: Sum
    clipped: Sum


def clipped_value_loss(
    values_BT: Float[Array, "B T"],
    old_values_BT: Float[Array, "B T"],
    returns_BT: Float[Array, "B T"],
    weights_BT: Mask,
    *,
    clip: float,
) -> ValueSums:
    """Sum of max((V - R)^2, (clip(V, old - clip, old + clip) - R)^2) / 2.

    R are the returns. The form is that of OpenAI's PPO, the choice ours: the paper does
    not mention its critic. An infinite `clip` gives the plain squared error.
    """
    assert clip > 0, clip
    values_BT, old_BT = _kept(values_BT, weights_BT), _kept(old_values_BT, weights_BT)
    returns_BT = _kept(returns_BT, weights_BT)
    near_BT = jnp.clip(values_BT, old_BT - clip, old_BT + clip)
    error_BT, near_error_BT = (values_BT - returns_BT) ** 2, (near_BT - returns_BT) ** 2
    return ValueSums(
        loss=_sum(jnp.maximum(error_BT, near_error_BT) * weights_BT) / 2,
        weight=_sum(weights_BT),
        clipped=_sum((near_error_BT > error_BT) * weights_BT),
    )


def _kept(values: Array, mask: Array) -> Array:
    """Zeros for what is masked, before any arithmetic: a NaN outlives a product by 0.

    Afterwards would be too late for gradients: 0 times infinity is not a number.
    """
    return jnp.where(mask > 0, values, 0.0)


def _sum(values: Array) -> Sum:
    return jnp.sum(values, dtype=jnp.float32)
