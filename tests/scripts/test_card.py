"""Cards: what they say is what runs and iterations wrote, whatever a model wrote."""

import dataclasses
import io
import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from rich.markdown import Markdown

from llama_jax.checkpoint.manager import RunCheckpoints
from llama_jax.checkpoint.params import save_params
from llama_jax.data import Prompt
from llama_jax.finetune import rejection
from llama_jax.finetune.rollout import Answer, Rollout, Scores
from llama_jax.model.count import abstract_params, num_params
from llama_jax.train.metrics import read_metrics
from llama_jax.train.pretrain import pretrain
from scripts import card, card_plots, card_text
from tests import runs
from tests.buckets import Buckets
from tests.data import corpus
from tests.data.prompts import prompts, write
from tests.endtoend.jobs import Job

HOSTILE = (
    "```\n| a | b |\n<script>alert(1)</script>\n# no heading\n````text\n[x](y) $z$"
)

LOSS_AXES = ["Loss", "Learning rate"]
STEPS = [
    {
        "step": step,
        "loss": loss,
        "grad_norm": 0.5,
        "learning_rate": rate,
        "num_targets": 128.0,
        "applied": loss is not None,
        "tokens_per_second": None,
        "mfu": None,
    }
    for step, loss, rate in (
        (1, 5.756789, 0.0),
        (2, None, 0.0123),
        (3, 2.5, 0.006),
        (4, 1.25, 0.00123),
    )
]
TIMES = {"step": 4, "time_shares": {"step": 1.0, "compile": 0.0}}
REPORT = {
    "accuracy": 0.75,
    "accuracy_by_rating": {"significantly better": 0.875, "not rated": 0.625},
    "accuracy_by_safety": {"both safe": 0.5625},
    "unsafe_recall": None,
    "calibration": {"sure": [0.51, 0.9], "right": [0.5, 0.8], "pairs": [4.0, 4.0]},
    "calibration_error": 0.0123,
    "scores": {"chosen": [0.0] * 19 + [1.0], "rejected": [1.0] + [0.0] * 19},
}


def measured(reward, kl):
    """What PPO tells of answers."""
    told = {"helpfulness": 0.61, "safety": 0.71, "answer_length": 11.5, "cut": 0.125}
    return {"reward": reward, "kl": kl, **told}


def held_out(reward):
    return {
        f"validation_{name}": value for name, value in measured(reward, 0.75).items()
    }


def iteration(number, reward, kl):
    seconds = {"answer_seconds": 12.5, "reshard_seconds": 1.5, "read_seconds": 3.25}
    return {"iteration": number, **measured(reward, kl), **seconds}


@pytest.fixture
def run(tmp_path):
    """Makes the work directory of a run with a recipe and metrics."""

    def make(recipe, records):
        params = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            abstract_params(recipe.model, recipe.head),
        )
        state = {"params": params, "optimizer": {"count": jnp.int32(4)}}
        workdir = tmp_path / "run"
        with RunCheckpoints(workdir, keep_latest=1, keep_period=0) as checkpoints:
            checkpoints.save(4, state, 32, recipe)
        lines = "".join(f"{json.dumps(record)}\n" for record in records)
        (workdir / "metrics.jsonl").write_text(lines)
        return workdir

    return make


def rollout(question, *answers):
    """Of texts with their combined scores; a text that ends with ... was cut."""
    made = [Answer(text, [5], not text.endswith("...")) for text, _ in answers]
    scores = np.array([score for _, score in answers], np.float32)
    prompt = Prompt([{"role": "user", "content": question}])
    return Rollout(prompt, [1, 9], made, Scores(scores - 1, scores + 1, scores))


@pytest.fixture
def sampled(tmp_path):
    """Makes the directory of an iteration."""

    def make(*rollouts):
        plan = {
            "num_prompts": len(rollouts),
            "prompts": "0",
            "num_samples": len(rollouts[0].answers),
            "sampler": "TopP(p=1.0, temperature=1.2)",
            "max_new_tokens": 24,
            "cache_length": 128,
            "seed": 7,
            "batch_size": 32,
            "tokenizer": "1",
            "policy": "2",
            "safety_model": "3",
            "helpfulness_model": "4",
            "threshold": 0.15,
        }
        path = tmp_path / "iteration"
        path.mkdir()
        (path / "iteration.json").write_text(json.dumps(plan))
        lines = "".join(map(rejection._to_line, rollouts))
        (path / "rollouts-00000-of-00001.jsonl").write_text(lines)
        return path

    return make


@pytest.fixture
def ghosts(tmp_path):
    """Makes a directory of rows of Ghost Attention, of what was said in turns."""

    def make(*dialogs):
        plan = {
            "num_dialogs": max(1, len(dialogs)),
            "num_samples": 4,
            "sampler": "TopP(p=1.0, temperature=0.5)",
            "resample": "all",
            "seed": 7,
            "batch_size": 32,
            "policy": "2",
        }
        path = tmp_path / "ghosts"
        path.mkdir()
        (path / "ghost.json").write_text(json.dumps(plan))
        roles = ("user", "assistant")
        rows = [
            {
                "messages": [
                    {"role": role, "content": text}
                    for role, text in zip(itertools.cycle(roles), dialog, strict=False)
                ],
                "learn": "last",
            }
            for dialog in dialogs
        ]
        lines = "".join(f"{json.dumps(row)}\n" for row in rows)
        (path / "rows-00000-of-00001.jsonl").write_text(lines)
        return path

    return make


def written(path, *options):
    """The rows of all tables of a card, as lists of cells, after it was written."""
    assert card.main([str(path), *options]) == 0
    assert (path / "card.png").read_bytes().startswith(b"\x89PNG")
    assert not list(path.glob(".card*"))
    tokens = Markdown((path / "card.md").read_text()).parsed
    rows, inside = [], False
    for token in tokens:
        assert token.type != "html_block"
        if token.type == "tr_open":
            rows.append([])
        inside = {"tr_open": True, "tr_close": False}.get(token.type, inside)
        if token.type == "inline":
            kinds = {child.type for child in token.children}
            assert kinds <= {"text", "image", "strong_open", "strong_close"}
            if inside:
                rows[-1].append("".join(child.content for child in token.children))
    return rows


def axes_of(path, *options):
    args = card.options([str(path), *options])
    return card.card_of(epath.Path(path), args).figure().axes


def titles(path):
    return [axes.get_title() for axes in axes_of(path)]


def test_any_run(run, tmp_path):
    data = corpus.prepare_corpus(tmp_path / "data", corpus.make_tokenizer(tmp_path))
    losses = [{"step": s, "validation_loss": v} for s, v in ((2, 3.25), (4, 3.5))]
    recipe = runs.recipe(data.path)
    workdir = run(recipe, [*STEPS, *losses, TIMES])
    rows = written(workdir)
    assert ["stage", "pretraining"] in rows
    assert not any(row[0] == "began with" for row in rows)
    (workdir / "init_from.txt").write_text("runs/before\n")
    assert ["began with", "runs/before"] in written(workdir)
    assert ["parameters", f"{num_params(recipe.model):,}"] in rows
    assert ["newest checkpoint", "step 4"] in rows
    for name in ("train", "validation"):
        split = data.splits[name]
        counts = f"{split.num_tokens:,}", f"{split.num_rows:,}"
        holds = f"{split.num_documents} documents"
        assert [str(data.path), "1", name, holds, *counts] in rows
    assert ["steps", "4 of 8"] in rows
    assert ["tokens a step", "128"] in rows
    assert ["highest learning rate", "0.0123 (step 2)"] in rows
    assert ["last learning rate", "0.00123 (step 4)"] in rows
    assert ["first loss, nats per token", "5.757 (step 1)"] in rows
    assert ["last loss", "1.25 (step 4)"] in rows
    assert ["best validation loss", "3.25 (step 2)"] in rows
    assert ["last validation loss", "3.5 (step 4)"] in rows
    (optimizer,) = (row for row in rows if row[0] == "optimizer")
    assert "peak_lr=0.01" in optimizer[1]

    loss, rate = axes_of(workdir)
    assert [loss.get_title(), rate.get_title()] == LOSS_AXES
    assert (loss.get_ylabel(), loss.get_xlabel()) == ("nats per token", "step")
    assert [list(line.get_xdata()) for line in loss.lines] == [[1, 3, 4], [2, 4]]
    labels = [text.get_text() for text in loss.get_legend().get_texts()]
    assert labels == ["training", "held out"]
    assert rate.get_legend() is None


def test_data_that_have_moved(run):
    assert ["gone", "1", "not there any more", "", "", ""] in written(
        run(runs.recipe("gone"), STEPS)
    )


def test_a_reward_model(run):
    recipe = runs.reward_recipe("data", 128).with_steps(8)
    earlier = {"step": 2, "validation_loss": 0.9, **REPORT, "accuracy": 0.25}
    last = {"step": 4, "validation_loss": 0.5, **REPORT}
    workdir = run(recipe, [*STEPS, earlier, last, TIMES])
    rows = written(workdir)
    assert ["stage", "reward modelling"] in rows
    assert ["parameters", f"{num_params(recipe.model, 'scalar'):,}"] in rows
    assert ["first loss, nats per pair", "5.757 (step 1)"] in rows
    start = rows.index(["", "after step 4"])
    assert rows[start + 1 : start + 6] == [
        ["accuracy", "75.0%"],
        ["accuracy, significantly better", "87.5%"],
        ["accuracy, not rated", "62.5%"],
        ["accuracy, both safe", "56.2%"],
        ["calibration error", "1.2%"],
    ]
    *before, by_rating, calibration, scores = axes_of(workdir)
    assert [axes.get_title() for axes in before] == LOSS_AXES
    assert [bar.get_width() for bar in by_rating.patches] == [0.875, 0.625]
    model, diagonal = calibration.lines
    assert list(model.get_xydata().ravel()) == [0.51, 0.5, 0.9, 0.8]
    assert list(diagonal.get_xydata().ravel()) == [0.5, 0.5, 1, 1]
    chosen, rejected = (patch.get_data().values for patch in scores.patches)
    assert chosen[-1] == rejected[0] == 1


def test_ppo(run):
    recipe = runs.ppo_recipe("data", 48, helpfulness="h|1", safety="s")
    records = [
        {"step": 1, **iteration(1, 0.25, 0.0)},
        *STEPS,
        {"step": 1, "value_loss": 0.75, "value_grad_norm": 1.0},
        {"step": 4, "clipped": 0.25, "update_kl": 0.001},
        {"step": 2, **held_out(0.375)},
        {"step": 4, **held_out(0.3125)},
        {"step": 5, **iteration(2, 0.5, 1.75)},
        TIMES,
    ]
    workdir = run(recipe, records)
    (workdir / "ppo.json").write_text(json.dumps({"init_from": "runs/sft"}))
    rows = written(workdir)
    assert ["began with", "runs/sft"] in rows
    start = rows.index(["", "iteration 1", "iteration 2"])
    assert rows[start + 1 : start + 11] == [
        ["reward, mean of Rc", "0.25", "0.5"],
        ["helpfulness, mean of σ(score)", "0.61", "0.61"],
        ["safety, mean of σ(score)", "0.71", "0.71"],
        ["KL from the reference, nats per answer", "0", "1.75"],
        ["length of answers, tokens", "11.5", "11.5"],
        ["answers that were cut", "12.5%", "12.5%"],
        ["tokens whose ratio is clipped", "25.0%", "25.0%"],
        ["seconds to answer", "12.5", "12.5"],
        ["of these, to copy the policy", "1.5", "1.5"],
        ["seconds to read the answers", "3.25", "3.25"],
    ]
    assert ["2", "0.375", "0.61", "0.71", "0.75", "11.5", "12.5%"] in rows
    assert ["4", "0.3125", "0.61", "0.71", "0.75", "11.5", "12.5%"] in rows
    assert "The best reward was 0.375 (step 2)." in (workdir / "card.md").read_text()
    (ppo,) = (row for row in rows if row[0] == "ppo")
    assert "helpfulness='h|1'" in ppo[1]
    assert titles(workdir) == [
        *LOSS_AXES,
        "Loss of the critic",
        "Reward",
        "Scores of the reward models",
        "Divergence from the reference",
        "Length of answers",
        "Answers that were cut",
        "Clipped ratios",
    ]


@pytest.mark.parametrize(
    "max_kl, said",
    [
        (None, "The best reward was 0.75 (step 3)."),
        (1.0, "The best reward within 1 nats of the reference was 0.375 (step 2)."),
        (0.5, "No pass was within 0.5 nats of the reference."),
    ],
)
def test_the_best_reward_is_one_within_the_bound(max_kl, said):
    far = {**held_out(0.75), "validation_kl": 100.0}
    passes = [{"step": 2, **held_out(0.375)}, {"step": 3, **far}]
    assert card_text.held_out_table(passes, max_kl).endswith(f"\n\n{said}")


def test_answers_of_ppo_are_those_of_its_best(run):
    recipe = runs.ppo_recipe("data", 48, helpfulness="h", safety="s")
    passes = [{"step": 2, **held_out(0.375)}, {"step": 4, **held_out(0.3125)}]
    workdir = run(recipe, [*STEPS, *passes])
    made = card.Run.open(epath.Path(workdir))
    assert made.answering == made.directory  # there is no early stop
    patient = {**made.recipe, "ppo": {**made.recipe["ppo"], "patience": 2}}
    made = dataclasses.replace(made, recipe=patient)
    assert made.answering == made.directory / "checkpoints/2"


def test_a_pass_from_before_divergence_was_measured():
    old = {"step": 2, **held_out(0.375)}
    del old["validation_kl"]
    row = "| 2 | 0.375 | 0.61 | 0.71 |  | 11.5 | 12.5% |"
    assert row in card_text.held_out_table([old], None).splitlines()


def test_a_run_of_ppo_that_has_one_iteration(run):
    recipe = runs.ppo_recipe("data", 48, helpfulness="h", safety="s")
    rows = written(run(recipe, [{"step": 1, **iteration(1, 0.25, 0.0)}, *STEPS]))
    assert ["reward, mean of Rc", "0.25", "0.25"] in rows
    assert ["", "iteration 1", "iteration 1"] in rows


def test_an_iteration(sampled):
    path = sampled(
        rollout("rhyme", ("moon", 0.0), (HOSTILE, 2.0), ("...", -2.0)),
        rollout("sum", ("3...", 1.0), ("...", 0.0), ("...", -1.0)),
    )
    rows = written(path, "--num-samples", "1")
    for row in (
        ["policy", "2"],
        ["prompts", "2"],
        ["answers", "6"],
        ["answers to choose from", "3"],
        ["sampler", "TopP(p=1.0, temperature=1.2)"],
        ["mean reward", "0.5"],
        ["best of 3", "0.8059"],  # of σ(2) and σ(1)
        ["answers that were cut", "66.7%"],
        ["prompts with an answer to learn from", "1"],
        ["1", "0.5", "0.5"],
        ["3", "0.8059", "0.5"],
    ):
        assert row in rows
    text = (path / "card.md").read_text()
    assert "**Best: safety 1, helpfulness 3, combined 2**" in text
    assert "**Worst: safety -3, helpfulness -1, combined -2 (cut)**" in text
    fences = [t.content for t in Markdown(text).parsed if t.type == "fence"]
    assert fences == ["rhyme\n", f"{HOSTILE}\n", "...\n"]
    curve, spread = axes_of(path)
    assert [line.get_label() for line in curve.lines] == ["max of N", "median of N"]
    assert sum(bar.get_height() for bar in spread.patches) == pytest.approx(2)


def test_rows_of_ghost_attention(ghosts):
    path = ghosts(("rhyme", "no", HOSTILE, "moon"), ("sum", "three"))
    rows = written(path, "--num-samples", "1")
    for row in (
        ["stage", "Ghost Attention"],
        ["policy", "2"],
        ["answers sampled of a dialog", "all"],
        ["answers to choose from", "4"],
        ["rows", "2"],
        ["turns of a row, on average", "1.5"],
        ["turns of the longest", "2"],
        ["length of the learnt answer, characters on average", "4.5"],
    ):
        assert row in rows
    text = (path / "card.md").read_text()
    assert "**Learnt**" in text
    fences = [t.content for t in Markdown(text).parsed if t.type == "fence"]
    assert fences == ["rhyme\n", "no\n", f"{HOSTILE}\n", "moon\n"]
    turns, lengths = axes_of(path)
    assert [bar.get_height() for bar in turns.patches] == [1, 1]
    assert sum(bar.get_height() for bar in lengths.patches) == 2


def test_rows_of_context_distillation(ghosts):
    path = ghosts(("secret", "no"))
    manifest = path / "ghost.json"
    plan = json.loads(manifest.read_text())
    del plan["num_samples"], plan["resample"]
    (path / "distilled.json").write_text(json.dumps(plan))
    manifest.unlink()
    rows = written(path)
    assert ["stage", "context distillation"] in rows and ["seed", "7"] in rows
    assert not any(row[0].startswith("answers") for row in rows)


def test_a_long_curve_is_shown_in_few_rows(sampled):
    answers = [(str(i), i / 30) for i in range(30)]
    rows = written(sampled(rollout("q", *answers)))
    start = rows.index(["N", "best of N", "median of N"])
    sizes = [row[0] for row in rows[start + 1 :]]
    assert sizes == ["1", "2", "3", "5", "10", "20", "30"]


def test_in_a_bucket(sampled, capsys):
    path = sampled(rollout("q", ("a", 0.5), ("b", 1.5)))
    server = Buckets()
    with server.serving(), server.clients():
        for file in path.iterdir():
            server.put(f"bucket/v1/{file.name}", file.read_bytes())
        assert card.main(["gs://bucket/v1"]) == 0
        assert "gs://bucket/v1/card.md" in capsys.readouterr().out
        assert b"combined 1.5" in server.objects["bucket/v1/card.md"]
        assert server.objects["bucket/v1/card.png"].startswith(b"\x89PNG")
        assert len(server.names("bucket/v1/")) == 4


@pytest.mark.parametrize("text", [HOSTILE, "`" * 7, "", "a\n\n    b\r\n```", "~~~\n\\"])
def test_no_text_is_more_than_text(text):
    sample = [{"role": "user", "content": text}], {"Greedy": text}
    rows = [(text, "b"), ("c", text)]
    parts = [card_text.samples([sample]), card_text.table(("", text), rows), "# end"]
    tokens = Markdown("\n\n".join(parts)).parsed
    fences = [token.content for token in tokens if token.type == "fence"]
    assert fences == 2 * [f"{text}\n".replace("\r\n", "\n")]
    headings = [i for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert [tokens[i + 1].content for i in headings] == ["Prompt 1", "end"]
    assert sum(token.type == "tr_open" for token in tokens) == 3
    assert sum(token.type in ("td_open", "th_open") for token in tokens) == 6
    for token in tokens:
        assert token.type != "html_block"
        inside = {child.type for child in token.children or ()}
        assert inside <= {"text", "strong_open", "strong_close"}


def test_plots_of_answers():
    told = measured(0.375, 1.5)
    worth, divergence = card_plots.page("t", card_plots.of_answers(told)).axes
    assert [bar.get_width() for bar in worth.patches] == [0.375, 0.61, 0.71]
    assert [bar.get_width() for bar in divergence.patches] == [1.5]


@pytest.mark.parametrize("num_plots", [1, 2, 5, 9])
def test_nothing_overlaps_or_is_clipped(num_plots):
    records = [{"step": 10**6 + i, "loss": 1e-5 * i} for i in range(3)]
    names = {"loss": "training"}
    plots = num_plots * card_plots.by_step(records, "A title", "a unit", names)
    title = "Pretraining: gs://bucket/a folder/" + "Long_" * 30 + "$_^<"
    figure = card_plots.page(title, plots)
    figure.savefig(io.BytesIO())
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    (suptitle,) = figure.texts
    boxes.append(suptitle.get_window_extent())
    assert len(boxes) == num_plots + 1
    width, height = figure.bbox.size
    for i, box in enumerate(boxes):
        assert 0 <= box.x0 and box.x1 <= width and 0 <= box.y0 and box.y1 <= height
        assert not any(box.overlaps(other) for other in boxes[:i])


class TestErrors:
    def said(self, capsys, path, *options):
        assert card.main([str(path), *map(str, options)]) == 1
        out, err = capsys.readouterr()
        assert out == "" and re.fullmatch(r"card: .+\n", err)
        assert not path.is_dir() or not list(path.glob("card.*"))
        return err

    def test_no_directory(self, tmp_path, capsys):
        for path in (tmp_path, tmp_path / "missing"):
            said = self.said(capsys, path)
            assert "is nothing that has a card" in said
            for name in ("checkpoints", "iteration", "ghost", "distilled"):
                assert name in said

    def test_nothing_saved(self, tmp_path, capsys):
        (tmp_path / "checkpoints").mkdir()
        assert "no finished checkpoint yet" in self.said(capsys, tmp_path)

    def test_no_metrics(self, run, capsys):
        workdir = run(runs.recipe("data"), [TIMES])
        assert "has no metrics.jsonl with steps" in self.said(capsys, workdir)
        (workdir / "metrics.jsonl").unlink()
        assert "has no metrics.jsonl with steps" in self.said(capsys, workdir)

    def test_an_iteration_that_is_not_done(self, sampled, capsys):
        path = sampled(rollout("q", ("a", 0.0)))
        (path / "rollouts-00000-of-00001.jsonl").unlink()
        assert "is not done" in self.said(capsys, path)

    def test_rows_that_are_not_done_or_none(self, ghosts, capsys):
        empty = ghosts()
        assert "has no rows" in self.said(capsys, empty)
        (empty / "rows-00000-of-00001.jsonl").write_text("{}\n")
        assert "is damaged" in self.said(capsys, empty)
        (empty / "rows-00000-of-00001.jsonl").unlink()
        assert "is not done" in self.said(capsys, empty)

    def test_prompts_for_what_does_not_write(
        self, run, sampled, ghosts, tmp_path, capsys
    ):
        file = write(tmp_path / "prompts.jsonl", prompts(2))
        for path in (sampled(rollout("q", ("a", 0.0))), ghosts(("q", "a"))):
            assert "leave out --prompts" in self.said(capsys, path, "--prompts", file)
        reward = run(runs.reward_recipe("data", 128).with_steps(8), STEPS)
        assert "is a reward model" in self.said(capsys, reward, "--prompts", file)

    def test_prompts_that_are_none(self, run, tmp_path, capsys):
        file = tmp_path / "prompts.jsonl"
        file.write_text('{"messages": []}\n')
        workdir = run(runs.recipe("data"), STEPS)
        assert "prompts.jsonl, line 1" in self.said(capsys, workdir, "--prompts", file)

    def test_a_directory_that_cannot_be_written(self, run, capsys):
        workdir = run(runs.recipe("data"), STEPS)
        (workdir / ".card.png.partial").mkdir()
        assert "cannot be written" in self.said(capsys, workdir)

    @pytest.mark.parametrize("value", ["0", "-1", "few"])
    def test_counts(self, value, capsys):
        with pytest.raises(SystemExit):
            card.main(["run", "--num-samples", value])
        assert "give an integer of 1 or more" in capsys.readouterr().err


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A run, three prompts, and the options of a card that has its answers scored."""
    path = tmp_path_factory.mktemp("real")
    tokenizer = corpus.make_tokenizer(path)
    data = corpus.prepare_corpus(path / "data", tokenizer)
    recipe = runs.changed(runs.recipe(data.path), "train", num_steps=2)
    recipe = runs.changed(recipe, "model", max_length=128)
    workdir = path / "run"
    assert pretrain(recipe, workdir)
    asked = prompts(3)
    file = write(path / "prompts.jsonl", asked)
    options = ["--prompts", str(file), "--num-samples", "2", "--max-new-tokens", "4"]
    rng = np.random.default_rng(0)
    for name in ("helpfulness", "safety"):
        params = jax.tree.map(
            lambda leaf: rng.normal(scale=0.15, size=leaf.shape).astype(np.float32),
            abstract_params(recipe.model, "scalar"),
        )
        save_params(path / name, params, recipe.model, tokenizer)
        options += [f"--{name}", str(path / name)]
    options += ["--reference", str(workdir), "--num-scored", "3", "--tensor", "2"]
    return workdir, asked, options


@pytest.mark.slow
def test_a_real_run_and_what_it_writes(real):
    workdir, asked, options = real
    rows = written(workdir, *options)
    assert ["prompts", "3"] in rows and ["reference", str(workdir)] in rows
    assert ["KL from the reference, nats per answer", "0"] in rows
    assert any(row[0] == "reward, mean of Rc" for row in rows)
    losses = [r["loss"] for r in read_metrics(workdir / "metrics.jsonl") if "loss" in r]
    assert ["first loss, nats per token", f"{losses[0]:.4g} (step 1)"] in rows
    assert ["last loss", f"{losses[1]:.4g} (step 2)"] in rows
    text = (workdir / "card.md").read_text()
    assert text.count("### Prompt") == 2
    assert text.count("**Greedy") == text.count("**Temperature 1") == 2
    fences = [t.content for t in Markdown(text).parsed if t.type == "fence"]
    assert fences[0] == asked[0]["messages"][0]["content"] + "\n"


CARD = "import sys, scripts.card as c; raise SystemExit(c.main(sys.argv[2:]))"


@pytest.mark.slow
def test_hosts_that_have_other_prompts(real, tmp_path):
    workdir, asked, options = real
    other = write(tmp_path / "other.jsonl", asked[:2])
    both = [[str(workdir), *options], [str(workdir), *options, "--prompts", str(other)]]
    with Job(tmp_path, *both, programs=dict.fromkeys((0, 1), CARD)) as job:
        assert all(job.ends()), job.everything()
        assert "do not agree on options, prompts" in job.said(0)


@pytest.mark.slow
def test_two_hosts_make_one_card(real, tmp_path):
    """The same eight devices, in one process and in two."""
    workdir, _, options = real
    written(workdir, *options)
    text = (workdir / "card.md").read_text()
    for name in ("card.md", "card.png"):
        (workdir / name).unlink()
    both = [[str(workdir), *options]] * 2
    with Job(tmp_path, *both, programs=dict.fromkeys((0, 1), CARD)) as job:
        assert job.ends() == [0, 0], job.everything()
        assert "Written to" in job.said(0) and "Written to" not in job.said(1)
    assert (workdir / "card.md").read_text() == text
