"""The main job on real text, in a few minutes on two cores: `make demo`.

Every step is a command that you could type, and is printed before it runs. Killed at
any moment and started again, it goes on from the last checkpoint.
"""

import math
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from matplotlib.figure import Figure

from llama_jax.config.recipe import load_recipe
from llama_jax.data.prepared import Prepared
from llama_jax.train.faults import EXIT_PREEMPTED
from llama_jax.train.metrics import METRICS, Record, read_metrics
from scripts.kneser_ney import KneserNey, stream

RUN = Path("runs/demo")
DATA, TOKENIZER, CURVE = RUN / "data", RUN / "vocabulary.model", RUN / "loss.png"
RECIPE = "configs/demo.py:small"
TEXT = f"--tfds shakespeare --tfds-dir {RUN}/tfds"
PROMPTS = (
    "**KING**",
    "My lord, ",
    "_Enter ",
)


def main() -> int:
    """All steps; returns the exit status."""
    recipe = load_recipe(RECIPE)
    vocab_size, row_length = recipe.model.vocab_size, recipe.data.sequence_length
    say("Text: a tokenizer, then rows of tokens")
    if not TOKENIZER.exists():
        run(f"data tokenizer {TEXT} --output {TOKENIZER} --vocab-size {vocab_size}")
    run(
        f"data prepare {TEXT} --tokenizer {TOKENIZER} --output {DATA} "
        f"--row-length {row_length}"
    )

    half = recipe.train.num_steps // 2
    say(f"Training: stopped after step {half}, then resumed by the same command")
    train = f"train {RECIPE} --workdir {RUN}"
    if last_step() < half and not stop_at(half, train):
        return 1
    run(train)

    records = read_metrics(RUN / METRICS)
    draw(records)
    say("How good it is, in bits per byte of held-out text")
    report(records)
    say("What it writes")
    prompts = " ".join(shlex.quote(prompt) for prompt in PROMPTS)
    run(f"generate {RUN} --max-new-tokens 80 --temperature 0.7 --prompt {prompts}")
    say("What to type next")
    print(f"""\
  source .venv/bin/activate
  llama-jax generate {RUN} --prompt "To be, or not to be"
  llama-jax inspect {RUN}
  llama-jax train {RECIPE} --workdir runs/longer --train.num-steps 3000
  llama-jax train configs/pretrain/llama2_7b.py:v5p_128 --dry-run
  python -c 'import llama_jax; print(llama_jax.load("{RUN}").generate(["Good morrow"]))'
The loss curve is {CURVE}; docs/training.md goes on from here.""")
    return 0


def say(text: str) -> None:
    """A heading."""
    print(f"\n== {text}", flush=True)


def run(command: str) -> None:
    """Show and run a command; end here if it fails."""
    status = start(command).wait()
    if status:
        sys.exit(status)


def start(command: str) -> subprocess.Popen[bytes]:
    """Show a command and start it."""
    print(f"$ llama-jax {command}", flush=True)
    program = Path(sys.executable).parent / "llama-jax"
    return subprocess.Popen([program, *shlex.split(command)])


def last_step() -> int:
    """The last step in the metrics of the run; 0 before the first."""
    return max((record["step"] for record in read_metrics(RUN / METRICS)), default=0)


def stop_at(step: int, command: str) -> bool:
    """Start training and ask it to stop once a step is done, as a preemption would."""
    process = start(command)
    while process.poll() is None:
        if last_step() >= step:
            print(f"-- SIGTERM after step {last_step()}", flush=True)
            process.send_signal(signal.SIGTERM)
            break
        try:
            process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            continue
    return process.wait() in (0, EXIT_PREEMPTED)  # 0: it was faster than the signal


def draw(records: list[Record]) -> None:
    """The loss curve as a picture."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, style in (("loss", "-"), ("validation_loss", "o")):
        points = [(r["step"], r[name]) for r in records if name in r]
        axes.plot(*zip(*points, strict=True), style, label=name.replace("_", " "))
    axes.set(xlabel="step", ylabel="nats per token", title="A small Llama 2")
    axes.legend()
    figure.savefig(CURVE, dpi=120)
    print(f"\nThe loss curve: {CURVE}")


def report(records: list[Record]) -> None:
    """The model beside Kneser-Ney models of the same tokens."""
    data = Prepared.load(DATA)
    validation = data.splits["validation"]
    nats = [r["validation_loss"] for r in records if "validation_loss" in r][-1]
    rows = {name: data.rows(name) for name in ("train", "validation")}
    streams = {
        name: stream(split[i] for i in range(len(split)))
        for name, split in rows.items()
    }
    table = {"this Llama 2": nats}
    for order, name in ((2, "Kneser-Ney bigram"), (3, "Kneser-Ney trigram")):
        model = KneserNey(
            streams["train"],
            order=order,
            vocab_size=data.vocab_size,
            start=data.bos_id,
        )
        table[name] = float(model.nats(streams["validation"]).mean())
    for name, nats in table.items():
        bits = nats * validation.num_targets / validation.text_bytes / math.log(2)
        print(f"  {name:20} {nats:.4f} nats per token   {bits:.4f} bits per byte")


if __name__ == "__main__":
    sys.exit(main())
