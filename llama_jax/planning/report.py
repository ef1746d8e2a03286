"""A plan as text, for people, and as JSON, for programs.

What the compiler laid out is stated as a fact; every time, and all that follows from
one, carries the word predicted.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from llama_jax.config.recipe import TrainingRecipe
from llama_jax.config.train import Remat, remat_pieces
from llama_jax.planning.decode import DecodePlan
from llama_jax.planning.estimate import NAME
from llama_jax.planning.passes import PassPlan
from llama_jax.planning.plan import NO_COMPILER, Plan, estimated, has_compiler
from llama_jax.planning.ppo import PpoPlan
from llama_jax.planning.search import Found
from llama_jax.planning.topology import Topology

GIB = 2**30


class Report:
    """A plan, for `rich.console.Console.print`."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> RenderResult:
        """Tables and lines, in order."""
        plan = self._plan
        yield f"{where(plan.topology)}; {layout(plan)}"
        if plan.source != "compiled":
            yield f"A {plan.source}: {NO_COMPILER}"
        yield ""
        yield _memory(plan)
        yield f"{verdict(plan)}"
        if plan.fits:
            yield ""
            yield _seconds(plan)
            if plan.collectives:
                yield ""
                yield _collectives(plan)
            yield ""
            yield from _totals(plan)


def where(topology: Topology) -> str:
    """A slice by both its names, and how they count."""
    chip = topology.chip
    per_slice = topology.num_chips // topology.slices
    sliced = f"{topology.slices} slices of " if topology.slices > 1 else ""
    return (
        f"{sliced}{topology.name} (the cloud's {topology.cloud_name} counts "
        f"{chip.counts}: {per_slice:,} chips)"
    )


def layout(plan: Plan) -> str:
    """Mesh, rows and remat in one line."""
    train = plan.recipe.train
    parts = f", {train.accumulate} parts of a batch" if train.accumulate > 1 else ""
    return (
        f"mesh {mesh(plan)}; {plan.rows_per_chip:g} rows of "
        f"{plan.recipe.data.sequence_length:,} per chip at once{parts}; remat "
        f"{train.remat}; {train.attention} attention"
    )


def mesh(plan: Plan) -> str:
    """The factors of the mesh that are not 1."""
    config = plan.recipe.mesh
    factors = [
        f"{field.name} {getattr(config, field.name)}"
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != 1
    ]
    return " x ".join(factors) or "of one device"


def verdict(plan: Plan) -> str:
    """Whether it fits, and by how much."""
    spare = (plan.hbm_limit - plan.hbm_bytes) / GIB
    of = f"of {plan.hbm_limit / GIB:.2f} GiB"
    host = f", and {plan.host_bytes / GIB:.2f} GiB of the host's" * bool(
        plan.host_bytes
    )
    if plan.fits:
        return f"It fits: {plan.hbm_bytes / GIB:.2f} {of}{host}, {spare:.2f} to spare."
    return f"It does not fit: {plan.hbm_bytes / GIB:.2f} {of}, {-spare:.2f} too many."


def remedies(plan: Plan) -> str:
    """What would make a plan fit, by the closed form."""
    recipe = plan.recipe
    train, optimizer, mesh_config = recipe.train, recipe.optimizer, recipe.mesh
    tried: list[tuple[str, TrainingRecipe]] = []

    def attempt(option: str, **changed: Any) -> None:
        tried.append((option, dataclasses.replace(recipe, **changed)))

    if mesh_config.data > 1:
        fsdp = mesh_config.data * mesh_config.fsdp
        divided = dataclasses.replace(mesh_config, data=1, fsdp=fsdp)
        attempt(f"--mesh.data 1 --mesh.fsdp {fsdp}", mesh=divided)
    for remat in ("projections", "attention_block", "attention", "full"):
        attempt(f"--train.remat {remat}", train=dataclasses.replace(train, remat=remat))
    full = dataclasses.replace(train, remat="full")
    for parts in (2, 4, 8, 16):
        accumulate = train.accumulate * parts
        rows = plan.rows_per_chip * recipe.mesh.context * recipe.mesh.tensor / parts
        if rows.is_integer() and rows:
            attempt(
                f"--train.accumulate {accumulate} --train.remat full",
                train=dataclasses.replace(full, accumulate=accumulate),
            )
    if optimizer.moments != "bfloat16":
        smaller = dataclasses.replace(optimizer, moments="bfloat16")
        attempt("--optimizer.moments bfloat16", optimizer=smaller)
    fitting = [
        option
        for option, changed in tried
        if estimated(changed, plan.topology, plan.power).fits
    ]
    if not fitting:
        return "Use a larger slice, or let --search look for a layout that fits."
    return (
        f"By the {NAME}, {' or '.join(fitting[:2])} would do; --search finds the "
        "fastest layout that fits."
    )


def to_json(plan: Plan) -> dict[str, Any]:
    """All figures of a plan; times in seconds, sizes in bytes, per chip and step."""
    return {
        "topology": plan.topology.name,
        "cloud_name": plan.topology.cloud_name,
        "slices": plan.topology.slices,
        "chips": plan.topology.num_chips,
        "mesh": dataclasses.asdict(plan.recipe.mesh),
        "rows_per_chip": plan.rows_per_chip,
        "accumulate": plan.recipe.train.accumulate,
        "remat": plan.recipe.train.remat,
        "attention": plan.recipe.train.attention,
        "source": plan.source,
        "fits": plan.fits,
        "hbm_bytes": plan.hbm_bytes,
        "hbm_limit": plan.hbm_limit,
        "host_bytes": plan.host_bytes,
        "memory": dict(plan.memory),
        "predicted": {
            "step_seconds": plan.step_seconds,
            "seconds": dict(plan.seconds),
            "mfu": plan.mfu,
            "tokens_per_second": plan.tokens_per_second,
            "days": plan.days,
            "chip_hours": plan.chip_hours,
            "energy_kwh": plan.energy_kwh,
            "co2_tonnes": plan.co2_tonnes,
            "collectives": [dataclasses.asdict(each) for each in plan.collectives],
        },
        "power": dataclasses.asdict(plan.power),
    }


def table(title: str, *columns: str) -> Table:
    """Lines without borders; the first column is text, the others are figures."""
    made = Table(title=title, title_justify="left", title_style="bold", box=None)
    for i, column in enumerate(columns):
        made.add_column(column, justify="right" if i else "left", overflow="fold")
    return made


def _memory(plan: Plan) -> Table:
    known = "the compiler's" if plan.source == "compiled" else plan.source
    made = table(f"Memory per chip ({known})", "", "GiB", "of HBM")
    rows = {**plan.memory, "at the fullest moment": plan.hbm_bytes}
    for kind, size in rows.items():
        made.add_row(kind, f"{size / GIB:.2f}", f"{size / plan.hbm_limit:.1%}")
    return made


def _seconds(plan: Plan) -> Table:
    made = table("Predicted time of a step", "", "seconds", "share")
    step_seconds = sum(plan.seconds.values())
    for part, seconds in {**plan.seconds, "in all": step_seconds}.items():
        made.add_row(part, f"{seconds:.3f}", f"{seconds / step_seconds:.1%}")
    return made


def _collectives(plan: Plan) -> Table:
    made = table(
        "Collectives of a step, per chip",
        "",
        "over",
        "network",
        "count",
        "GB",
        "predicted s",
        "predicted exposed s",
    )
    for each in plan.collectives:
        made.add_row(
            each.kind,
            " x ".join(each.axes),
            each.network.upper(),
            f"{each.count:,}",
            f"{each.num_bytes / 1e9:.2f}",
            f"{each.seconds:.3f}",
            f"{each.exposed_seconds:.3f}",
        )
    return made


def _totals(plan: Plan) -> Iterator[str]:
    assert plan.mfu and plan.tokens_per_second
    yield (
        f"Predicted: {plan.step_seconds:.2f} s a step, MFU {plan.mfu:.1%}, "
        f"{plan.tokens_per_second:,.0f} tokens/s."
    )
    if plan.days is None:
        return
    assert plan.chip_hours and plan.energy_kwh
    assert plan.co2_tonnes is not None  # 0 of a clean grid
    chip, power = plan.topology.chip, plan.power
    tokens = plan.tokens_per_step * plan.recipe.train.num_steps
    yield (
        f"Predicted for {tokens:.3g} tokens in {plan.recipe.train.num_steps:,} steps: "
        f"{plan.days:,.1f} days, {plan.chip_hours:,.0f} chip-hours, "
        f"{plan.energy_kwh:,.0f} kWh, {plan.co2_tonnes:,.1f} t CO2eq"
    )
    source = chip.tdp_source if power.watts_per_chip == chip.tdp_watts else "as you say"
    yield (
        f"at {power.watts_per_chip:g} W per chip ({source}), PUE "
        f"{power.overhead:g} and {power.kg_co2_per_kwh:g} kg CO2eq per kWh."
    )


class Ranking:
    """What a search found, for `rich.console.Console.print`."""

    def __init__(self, found: Found) -> None:
        self._found = found

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> RenderResult:
        """The ranking, and the best layout in words."""
        found = self._found
        best = found.plans[0]
        yield where(best.topology)
        if best.source != "compiled":
            yield f"A {best.source}: {NO_COMPILER}"
        made = table(
            f"{found.num_tried:,} layouts tried by the {NAME}, {found.num_near:,} fit "
            f"or nearly; {len(found.plans) + len(found.refused)} "
            + ("compiled" if best.source == "compiled" else "shown"),
            "mesh",
            "rows",
            "parts",
            "remat",
            "GiB",
            "predicted s",
            "predicted MFU",
        )
        for plan in found.plans:
            made.add_row(
                mesh(plan),
                f"{plan.rows_per_chip:g}",
                f"{plan.recipe.train.accumulate}",
                plan.recipe.train.remat,
                f"{plan.hbm_bytes / GIB:.1f}",
                f"{plan.step_seconds:.2f}",
                f"{plan.mfu:.1%}",
            )
        for plan in found.refused:
            made.add_row(
                mesh(plan),
                f"{plan.rows_per_chip:g}",
                f"{plan.recipe.train.accumulate}",
                plan.recipe.train.remat,
                f"{plan.hbm_bytes / GIB:.1f}",
                "does not fit",
                "",
            )
        yield made
        yield from explain(found)


def explain(found: Found) -> Iterator[str]:
    """The best layout in words: what it keeps, what it waits for, what limits it."""
    best = found.plans[0]
    train, spare = best.recipe.train, best.hbm_limit - best.hbm_bytes
    assert best.step_seconds is not None
    yield (
        f"Best: {layout(best)}. Predicted {best.step_seconds:.2f} s a step, MFU "
        f"{best.mfu:.1%}."
    )
    yield (
        "What it keeps: "
        + "; then ".join(
            (f"in {count} layers " if count else "in all other layers " if i else "")
            + _KEEPS[policy]
            for i, (policy, count) in enumerate(remat_pieces(train.remat))
        )
        + "."
    )
    exposed = best.seconds["exposed communication"]
    share = exposed / best.step_seconds
    longest = max(best.collectives, key=lambda each: each.exposed_seconds, default=None)
    told = "No time is spent waiting for the network."
    if longest is not None and exposed:
        told = (
            f"What it waits for: the network, predicted {exposed:.2f} s of a step "
            f"({share:.1%}), most of all {longest.kind} over "
            f"{' x '.join(longest.axes)} ({longest.exposed_seconds:.2f} s)."
        )
    yield told
    compute = best.step_seconds - exposed
    ideal = (best.mfu or 0) * best.step_seconds
    yield (
        f"What limits it: predicted {compute:.2f} s of computing for {ideal:.2f} s of "
        "the model's own FLOPs at peak (the rest is recomputation, kernels and "
        f"products below peak), and memory with {spare / GIB:.1f} GiB to spare."
    )
    if len(found.plans) > 1:
        second = found.plans[1]
        assert second.step_seconds is not None
        slower = second.step_seconds / best.step_seconds - 1
        yield (
            f"The next, {layout(second)}, is predicted {abs(slower):.1%} "
            f"{'slower' if slower >= 0 else 'faster but less simple'}: it computes "
            f"{_difference(best, second)} and waits "
            f"{second.seconds['exposed communication'] - exposed:+.2f} s."
        )


_KEEPS: dict[Remat, str] = {
    "none": "everything, so the backward pass repeats nothing",
    "projections": (
        "every product but the last, so the backward pass repeats norms and "
        "rotations only"
    ),
    "attention_block": (
        "attention's products, so the backward pass repeats gate and up"
    ),
    "attention": (
        "what the kernel gives, so the backward pass repeats all products but the "
        "kernel's"
    ),
    "full": "the residual stream alone, so the backward pass repeats the forward one",
    "offload": (
        "attention's products in the host's memory, so the backward pass repeats "
        "gate and up"
    ),
}


def _difference(best: Plan, other: Plan) -> str:
    def computing(plan: Plan) -> float:
        return sum(plan.seconds.values()) - plan.seconds["exposed communication"]

    return f"{computing(other) - computing(best):+.2f} s"


class PpoReport:
    """A plan of PPO's iterations, for `rich.console.Console.print`."""

    def __init__(self, plan: PpoPlan) -> None:
        self._plan = plan

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> RenderResult:
        """The policy's step, writing, passes over answers, and all together."""
        plan = self._plan
        yield Report(plan.learning)
        yield ""
        yield DecodeReport(plan.writing)
        yield ""
        if plan.critic is not None:
            yield _passes(*plan.reading, plan.critic)
            yield ""
        yield ppo_verdict(plan)
        if (
            plan.writing_seconds
            and plan.reading_seconds
            and plan.policy_seconds
            and plan.critic_seconds
        ):
            ppo = plan.recipe.ppo
            yield (
                f"Predicted, of an iteration: {plan.writing_seconds:.0f} s for "
                f"{ppo.prompts} answers of {ppo.max_new_tokens:,} tokens to prompts as "
                "long as may be, "
                f"{plan.reading_seconds:.0f} s for reading them, and for "
                f"{plan.recipe.iteration_steps} steps {plan.policy_seconds:.0f} s of "
                f"the policy and {plan.critic_seconds:.0f} s of the critic. To it "
                "come the copy of the weights, and what is measured."
            )


def _passes(*passes: PassPlan) -> Table:
    rows = table("Passes over all answers", "", "GiB beside all kept", "predicted s")
    for each in passes:
        seconds = "-" if each.seconds is None else f"{each.seconds:.1f}"
        rows.add_row(each.what, f"{each.working_bytes / GIB:.2f}", seconds)
    return rows


def ppo_verdict(plan: PpoPlan) -> str:
    """Whether a chip holds all models in each of its works, and by how much."""
    limit = plan.learning.hbm_limit

    def verdict(doing: str, needed: int) -> str:
        does = "fits" if needed <= limit else "does not fit"
        return f"{doing} {does}: {needed / GIB:.2f} of {limit / GIB:.2f} GiB."

    said = [verdict("Beside all else that a chip holds, answering", plan.writing_bytes)]
    if plan.writing_bytes > limit:
        said.append(
            "Let more chips share the copy (--ppo.decode-tensor), or fewer prompts be "
            "answered at a time (--ppo.decode-batch)."
        )
    if plan.reading_bytes is not None:
        said.append(verdict("Reading the answers", plan.reading_bytes))
        if plan.reading_bytes > limit:
            said.append(
                "Let rows be shorter (--data.sequence-length), or take a larger slice."
            )
    if plan.critic_bytes is not None:
        said.append(verdict("A step of the critic", plan.critic_bytes))
        if plan.critic_bytes > limit:
            said.append(
                "Save less of each layer (--train.remat), or take a larger slice."
            )
    return " ".join(said)


def ppo_to_json(plan: PpoPlan) -> dict[str, Any]:
    """All figures of a plan of PPO; sizes in bytes, times in seconds."""
    return to_json(plan.learning) | {
        "fits": plan.fits,
        "writing": decode_to_json(plan.writing),
        "writing_bytes": plan.writing_bytes,
        "reading": [dataclasses.asdict(each) for each in plan.reading],
        "reading_bytes": plan.reading_bytes,
        "critic": plan.critic and dataclasses.asdict(plan.critic),
        "critic_bytes": plan.critic_bytes,
        "predicted_iteration": {
            "writing_seconds": plan.writing_seconds,
            "reading_seconds": plan.reading_seconds,
            "policy_seconds": plan.policy_seconds,
            "critic_seconds": plan.critic_seconds,
        },
    }


class DecodeReport:
    """A plan of inference, for `rich.console.Console.print`."""

    def __init__(self, plan: DecodePlan) -> None:
        self._plan = plan

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> RenderResult:
        """Memory, then time."""
        plan = self._plan
        limit = plan.topology.chip.hbm_bytes
        yield (
            f"{where(plan.topology)}; {plan.mesh.tensor} chips share each layer, "
            f"{plan.topology.num_chips // plan.mesh.tensor} copies; {plan.batch} rows, "
            f"{plan.length:,} slots of cache each"
        )
        memory = table("Memory per chip", "", "GiB", "of HBM")
        held = {
            f"weights, {plan.weights}": plan.weight_bytes,
            f"cache, {plan.cache}": plan.cache_bytes,
        }
        if plan.chunk_bytes is not None and plan.loop_bytes is not None:
            held["at most, reading prompts (the compiler's)"] = plan.chunk_bytes
            held["at most, writing (the compiler's)"] = plan.loop_bytes
        for kind, size in held.items():
            memory.add_row(kind, f"{size / GIB:.2f}", f"{size / limit:.1%}")
        yield memory
        times = table("Predicted time of a token of each row", "", "ms", "tokens/s")
        rows = {"bound by HBM (closed form)": (plan.bound_seconds, 1)}
        if plan.token_seconds is not None:
            rows["the compiled loop"] = (plan.token_seconds, 1)
        if plan.chunk_seconds is not None:
            what = f"of its prompt, {plan.chunk} read at a time"
            rows[what] = (plan.chunk_seconds, plan.chunk)
        for what, (seconds, tokens) in rows.items():
            each, speed = 1e3 * seconds / tokens, plan.batch * tokens / seconds
            times.add_row(what, f"{each:.2f}", f"{speed:,.0f}")
        yield times
        yield decode_verdict(plan)


def decode_verdict(plan: DecodePlan) -> str:
    """Whether it fits, and what the compiled loop does with the cache."""
    held = plan.held_bytes
    limit = plan.topology.chip.hbm_bytes
    if not plan.fits:
        wide = {"--weights": plan.weights, "--cache": plan.cache}
        int8 = " and ".join(f"{name} int8" for name in wide if wide[name] != "int8")
        return (
            f"It does not fit: {held / GIB:.2f} of {limit / GIB:.2f} GiB per chip. Let "
            f"more chips share each layer (--tensor), or use {int8}{', ' * bool(int8)}"
            "fewer rows (--batch), a shorter cache (--length) or a larger slice."
        )
    if plan.token_seconds is None:
        return "It fits, by closed form" + (
            "." if has_compiler() else f": {NO_COMPILER}"
        )
    copied = "does not copy the cache"
    if plan.copied_bytes:
        copied = f"copies {plan.copied_bytes / 1e9:.2f} GB of the cache at every token"
    return (
        f"It fits. The compiled loop {copied}; it is predicted at "
        f"{plan.token_seconds / plan.bound_seconds:.1f} times the bound."
    )


def decode_to_json(plan: DecodePlan) -> dict[str, Any]:
    """All figures of a plan of inference; sizes in bytes, times in seconds."""
    return {
        "topology": plan.topology.name,
        "cloud_name": plan.topology.cloud_name,
        "slices": plan.topology.slices,
        "chips": plan.topology.num_chips,
        "mesh": dataclasses.asdict(plan.mesh),
        "batch": plan.batch,
        "length": plan.length,
        "weights": plan.weights,
        "cache": plan.cache,
        "chunk": plan.chunk,
        "fits": plan.fits,
        "weight_bytes": plan.weight_bytes,
        "read_bytes": plan.read_bytes,
        "cache_bytes": plan.cache_bytes,
        "hbm_bytes": plan.hbm_bytes,
        "chunk_bytes": plan.chunk_bytes,
        "loop_bytes": plan.loop_bytes,
        "copied_bytes": plan.copied_bytes,
        "predicted": {
            "token_seconds": plan.token_seconds,
            "bound_seconds": plan.bound_seconds,
            "chunk_seconds": plan.chunk_seconds,
        },
    }
