"""Fine-tuning on two hosts: equal to one alone, and told together what is wrong."""

import numpy as np
import pytest

from llama_jax.finetune.reward import train_reward
from llama_jax.finetune.sft import sft
from llama_jax.train.metrics import METRICS, read_metrics
from tests import runs
from tests.data import comparisons, corpus, dialogs
from tests.data.comparisons import prepare_pairs
from tests.data.dialogs import prepare_chats
from tests.endtoend.jobs import TRAIN, Job
from tests.finetune.conftest import save_untrained
from tests.parity import tolerances

pytestmark = pytest.mark.slow


STAGES = {
    "sft": (sft, prepare_chats, runs.sft_recipe, dialogs.LENGTH),
    "reward": (train_reward, prepare_pairs, runs.reward_recipe, comparisons.LENGTH),
}


@pytest.fixture(scope="module", params=STAGES)
def stage(request):
    return request.param


@pytest.fixture(scope="module")
def place(tmp_path_factory, stage):
    """Rows, a model that nobody trained, and a recipe for both."""
    _, prepare, _, length = STAGES[stage]
    place = tmp_path_factory.mktemp(stage)
    tokenizer = corpus.make_tokenizer(place)
    prepare(place, tokenizer, length=length)
    save_untrained(place / "base", tokenizer)
    (place / "recipe.py").write_text(
        "from tests.endtoend.test_hosts_finetune import recipe\n\n\n"
        f"def tiny():\n    return recipe({stage!r}, {str(place)!r})\n"
    )
    return place


def recipe(stage, place):
    """Small steps: larger ones let the rounding of sums grow from one to the next."""
    _, _, made, length = STAGES[stage]
    return runs.changed(made(f"{place}/rows", length), "optimizer", peak_lr=1e-3)


def argv(place, workdir) -> list[str]:
    words = [f"{place}/recipe.py:tiny", "--workdir", str(workdir)]
    return [*words, "--init-from", str(place / "base")]


def losses(workdir) -> dict[int, float]:
    records = read_metrics(workdir / METRICS)
    return {r["step"]: r["loss"] for r in records if "loss" in r}


def test_two_hosts_fine_tune_as_one(stage, place, tmp_path):
    train, *_ = STAGES[stage]
    one = recipe(stage, place)
    assert train(one, tmp_path / "one", init_from=place / "base")
    words = argv(place, tmp_path / "two")
    with Job(tmp_path / "logs", words, words) as job:
        assert job.ends() == [0, 0], job.everything()
    alone, together = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert together == pytest.approx(alone, abs=tolerances.ORDER_LOSS)
    last = max(alone)
    before, after = (runs.saved(tmp_path / name, last) for name in ("one", "two"))
    for name in before:
        bound = tolerances.ORDER_PARAMS_RELATIVE * np.abs(before[name]).max()
        np.testing.assert_allclose(
            after[name], before[name], rtol=0, atol=bound, err_msg=name
        )


def test_a_host_without_the_data_is_told_by_all(place, tmp_path):
    words = argv(place, tmp_path / "run")
    program = (
        "from llama_jax.train import run as r; opened = r.open_data\n"
        "import dataclasses\n"
        "r.open_data = lambda c: opened(dataclasses.replace(c, paths=('gone',)))\n"
        f"{TRAIN}"
    )
    with Job(tmp_path / "logs", words, words, programs={1: program}) as job:
        assert job.ends() == [1, 1], job.everything()
        for host in (0, 1):
            assert "the hosts do not agree on data" in job.said(host)
    assert not (tmp_path / "run" / METRICS).exists()
