"""A picture of a plan: a roofline, and the timelines of one layer, all predicted."""

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from llama_jax.errors import PlanError
from llama_jax.planning.plan import Plan
from llama_jax.planning.report import layout, where
from llama_jax.planning.schedule import Loop

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def require_matplotlib() -> None:
    """Find out before anything is compiled whether there is something to draw with.

    Raises:
      PlanError: there is not.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise PlanError(
            "a plot is drawn by matplotlib, which is not installed: "
            "pip install 'llama-jax[demo]'."
        )


def draw(plan: Plan, path: Path) -> None:
    """Write the picture as PNG.

    Raises:
      PlanError: matplotlib is missing, or the plan has no compiled program to draw.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    if plan.profile is None:
        raise PlanError(
            "there is no program whose timeline could be drawn: the plan has to fit, "
            "and libtpu, which compiles it, to be installed."
        )
    figure = Figure(figsize=(11, 11), layout="constrained")
    figure.suptitle(f"{where(plan.topology)}\n{layout(plan)}", fontsize=9)
    loops = list(_layers(plan.profile.loops))
    roofline, *timelines = figure.subplots(1 + len(loops), 1, squeeze=False)[:, 0]
    _draw_roofline(roofline, plan)
    labels = sorted({span.label for loop in loops for span in loop.spans})
    colors = {label: f"C{number % 10}" for number, label in enumerate(labels)}
    for axes, loop in zip(timelines, loops, strict=True):
        _draw_timeline(axes, loop, colors)
    figure.savefig(path, format="png", dpi=110)


def _layers(loops: tuple[Loop, ...]) -> Iterator[Loop]:
    """Of each pass, the loop that takes longest: that over the layers."""
    for direction in ("forward", "backward"):
        of_pass = [
            loop for loop in loops if loop.direction == direction and loop.trips > 1
        ]
        if of_pass:
            yield max(of_pass, key=lambda loop: loop.trips * loop.seconds)


def _draw_roofline(axes: "Axes", plan: Plan) -> None:
    chip = plan.topology.chip
    ridge = chip.peak_flops / chip.hbm_bandwidth
    intensity = np.geomspace(ridge / 30, ridge * 100, 200)
    roof = np.minimum(chip.peak_flops, intensity * chip.hbm_bandwidth)
    axes.loglog(intensity, roof / 1e12, color="black")
    for name, (flops, moved, seconds) in _products(plan).items():
        axes.plot(flops / moved, flops / seconds / 1e12, "o", label=name)
    axes.set(
        xlabel="FLOPs per byte of HBM",
        ylabel="predicted TFLOP/s of a chip",
        title=f"Roofline of {chip.name}: the phases of a block, forward",
    )
    axes.legend(loc="lower right", fontsize=8)


def _products(plan: Plan) -> dict[str, tuple[float, float, float]]:
    """FLOPs, bytes and predicted seconds of a step's forward phases, on one chip."""
    assert plan.profile is not None
    recipe, c = plan.recipe, plan.recipe.model
    width = jnp.dtype(recipe.train.compute_dtype).itemsize
    tensor = recipe.mesh.tensor
    tokens = plan.rows_per_chip * tensor * recipe.data.sequence_length
    runs = c.num_layers * recipe.train.accumulate
    heads, keys = c.num_heads * c.head_dim, 2 * c.num_kv_heads * c.head_dim
    sizes = {
        "query_key_value": (c.dim, (heads + keys) / tensor),
        "out": (heads / tensor, c.dim),
        "mlp": (c.dim, 3 * c.hidden_dim / tensor),
    }
    seconds = {
        scope.name: scope.seconds
        for scope in plan.profile.scopes
        if scope.direction == "forward"
    }
    products = {
        name: (
            2 * tokens * inward * outward * runs,
            (tokens * (inward + outward) + inward * outward) * width * runs,
            seconds[name],
        )
        for name, (inward, outward) in sizes.items()
        if name in seconds
    }
    if "attend" in seconds:
        scores = 2 * tokens * recipe.data.sequence_length * heads / tensor * runs
        moved = tokens * (2 * heads + keys) / tensor * width * runs
        products["attend"] = (scores, moved, seconds["attend"])
    return products


def _draw_timeline(axes: "Axes", loop: Loop, colors: Mapping[str, str]) -> None:
    """A lane for the chip, and one for each thing that runs beside it."""
    lanes = sorted({span.resource for span in loop.spans}, key=lambda r: r != "compute")
    for label in dict.fromkeys(span.label for span in loop.spans):
        spans = [span for span in loop.spans if span.label == label]
        axes.barh(
            [lanes.index(span.resource) for span in spans],
            [1e3 * (span.end - span.start) for span in spans],
            left=[1e3 * span.start for span in spans],
            color=colors[label],
            label=label,
        )
    axes.set_yticks(range(len(lanes)), lanes)
    axes.invert_yaxis()
    axes.set(
        xlabel="predicted ms",
        title=f"One layer, {loop.direction} pass: predicted {1e3 * loop.seconds:.2f} "
        f"ms, {loop.trips} times",
    )
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7)
