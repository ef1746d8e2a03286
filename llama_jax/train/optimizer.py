"""AdamW as the paper uses it (section 2.2), of optax parts."""

import jax
import jax.numpy as jnp
import optax

from llama_jax.config.train import OptimizerConfig
from sharding.axes import Tree


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Learning rate of each step: linear from 0 to the peak, then half a cosine.

    Reaches `final_lr_fraction` of the peak at `num_steps`, if that lies behind the
    warm-up.
    """
    warmup_steps = max(config.warmup_steps, round(config.warmup_fraction * num_steps))
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.peak_lr,
        warmup_steps=warmup_steps,
        decay_steps=max(num_steps, warmup_steps + 1),
        end_value=config.peak_lr * config.final_lr_fraction,
    )


def make_optimizer(
    config: OptimizerConfig, num_steps: int
) -> optax.GradientTransformation:
    """Clip the global norm, then AdamW; weight decay on matrices only."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            make_schedule(config, num_steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
    )
    return _kept_in(jnp.dtype(config.moments), optimizer)


def decayed(params: Tree) -> Tree:
    """True for each parameter that weight decay pulls on: all but the norms' scales."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key != "scale", params
    )


def _kept_in(
    dtype: jnp.dtype, optimizer: optax.GradientTransformation
) -> optax.GradientTransformation:
    """`optimizer`, its moments narrowed between updates, each of them in float32.

    (Optax narrows the first moment alone, and then updates it in the narrow type.)
    """

    def cast(state: optax.OptState, to: jnp.dtype) -> optax.OptState:
        # Counts are integers; every other array of the state is a moment.
        return jax.tree.map(
            lambda x: x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) else x,
            state,
        )

    def init(params: optax.Params) -> optax.OptState:
        return cast(optimizer.init(params), dtype)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, optax.OptState]:
        wide = cast(state, jnp.dtype("float32"))
        updates, wide = optimizer.update(updates, wide, params)
        return updates, cast(wide, dtype)

    return optax.GradientTransformation(init, update)
