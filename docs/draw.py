"""Draw the pictures of docs/parallelism.md from the code that they explain.

python docs/draw.py [FOLDER]     writes mesh.svg, weight.svg and order.svg
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from sharding import (
    MeshConfig,
    array_sharding,
    axes,
    context,
    make_mesh,
    training_rules,
)

PICTURES = Path(__file__).with_name("pictures")
# The same bytes each time: no date, and names that do not change.
matplotlib.rcParams.update(
    {"svg.hashsalt": "llama-jax", "svg.fonttype": "none", "font.size": 9}
)
COLOURS = plt.get_cmap("tab10")


def box(
    ax: Axes, x: float, y: float, width: float, height: float, colour: int, text: str
) -> None:
    """A labelled rectangle in a device's colour."""
    face = COLOURS(colour, alpha=0.35)
    ax.add_patch(Rectangle((x, y), width, height, facecolor=face, edgecolor="black"))
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center")


def blank(width: float, height: float, title: str) -> Axes:
    """An empty drawing, y downwards."""
    _, ax = plt.subplots(figsize=(width, height))
    ax.set_title(title, fontsize=10)
    ax.set_axis_off()
    return ax


def draw_mesh() -> None:
    """Eight devices as data 2 x fsdp 2 x tensor 2, and the rows each works on."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    sharding = array_sharding(
        training_rules(sequence_parallel=False), mesh, axes.BATCH, None
    )
    rows = sharding.devices_indices_map((8, 1))
    ax = blank(6, 3.2, "MeshConfig(data=2, fsdp=2, tensor=2), a batch of 8 rows")
    for (data, fsdp, _, tensor), device in np.ndenumerate(mesh.devices):
        start, stop, _ = rows[device][0].indices(8)
        x, y = data * 3 + tensor * 1.3, fsdp * 1.1
        box(ax, x, y, 1.2, 1, device.id, f"device {device.id}\nrows {start}-{stop - 1}")
    for data in range(2):
        ax.text(data * 3 + 1.25, -0.3, f"data {data}", ha="center", weight="bold")
        for tensor in range(2):
            x = data * 3 + tensor * 1.3 + 0.6
            ax.text(x, 2.35, f"tensor {tensor}", ha="center")
    for fsdp in range(2):
        ax.text(-0.15, fsdp * 1.1 + 0.5, f"fsdp {fsdp}", ha="right", va="center")
    ax.set(xlim=(-0.9, 5.7), ylim=(2.5, -0.5))


def draw_weight() -> None:
    """Which devices hold which part of `gate [D, F]` on that mesh."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    rules = training_rules(sequence_parallel=False)
    places = array_sharding(rules, mesh, axes.EMBED, axes.MLP).devices_indices_map(
        (2, 2)
    )
    held: dict[tuple[int, int], list[int]] = {}
    for device, (row, column) in places.items():
        place = (row.indices(2)[0], column.indices(2)[0])
        held.setdefault(place, []).append(device.id)
    ax = blank(4.4, 3, "gate [D, F]: who holds what")
    for (row, column), devices in held.items():
        text = "devices " + " and ".join(map(str, sorted(devices)))
        box(ax, column * 2, row, 2, 1, min(devices), text)
    ax.text(2, -0.1, "F: split over tensor, never gathered", ha="center")
    ax.text(2, 2.25, "the two devices of a part are replicas (data)", ha="center")
    ax.text(-0.1, 1, "D: split over fsdp", ha="center", va="center", rotation=90)
    ax.set(xlim=(-0.3, 4.1), ylim=(2.4, -0.3))


def draw_order() -> None:
    """Which part of causal attention each device works on, in two orders."""
    parts, length = 4, 16
    owner = np.empty(length, int)
    for place, position in enumerate(context.placement(length, parts)):
        owner[position] = place * parts // length
    _, drawings = plt.subplots(1, 2, figsize=(7, 3.6))
    in_turn = np.arange(length) * parts // length
    for ax, owners, title in (
        (drawings[0], in_turn, "in turn"),
        (drawings[1], owner, "as placed: an early and a late chunk each"),
    ):
        work = np.bincount(owners, weights=np.arange(1, length + 1)).astype(int)
        for query in range(length):
            for key in range(query + 1):
                box(ax, key, query, 1, 1, owners[query], "")
        ax.set(xlim=(0, length), ylim=(length, 0), xlabel="key", ylabel="query")
        ax.set_title(f"{title}\npairs per device: {', '.join(map(str, work))}", size=9)
        ax.set_aspect("equal")


DRAWINGS: dict[str, Callable[[], None]] = {
    "mesh": draw_mesh,
    "weight": draw_weight,
    "order": draw_order,
}


def main(folder: Path) -> None:
    """Draw all into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    assert jax.device_count() == 8, "started with another number of devices"
    for name, draw in DRAWINGS.items():
        draw()
        plt.savefig(
            folder / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight"
        )
        plt.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURES)
