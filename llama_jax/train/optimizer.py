"""AdamW as the paper uses it (section 2.2), of optax parts."""

import jax
import optax

from llama_jax.config.train import OptimizerConfig
from sharding.axes import Tree


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Learning rate of each step: linear from 0 to the peak, then half a cosine.

    Reaches `final_lr_fraction` of the peak at `num_steps`, if that lies behind the
    warm-up.
    """
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.peak_lr,
        warmup_steps=config.warmup_steps,
        decay_steps=max(num_steps, config.warmup_steps + 1),
        end_value=config.peak_lr * config.final_lr_fraction,
    )


def make_optimizer(
    config: OptimizerConfig, num_steps: int
) -> optax.GradientTransformation:
    """Clip the global norm, then AdamW; weight decay on matrices only."""
    return optax.chain(
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


def decayed(params: Tree) -> Tree:
    """True for each parameter that weight decay pulls on: all but the norms' scales."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key != "scale", params
    )
