"""Fine-tuning on two hosts: equal to one alone, and told together what is wrong."""

import numpy as np
import pytest

from llama_jax.build import build
from llama_jax.checkpoint.params import save_params
from llama_jax.finetune.sft import sft
from llama_jax.train.metrics import METRICS, read_metrics
from sharding import make_mesh, training_rules
from tests import runs
from tests.data import corpus
from tests.data.dialogs import LENGTH, prepare_chats
from tests.endtoend.jobs import TRAIN, Job
from tests.parity import tolerances

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Rows of dialogs, a model that nobody trained, and a recipe for both."""
    place = tmp_path_factory.mktemp("place")
    tokenizer = corpus.make_tokenizer(place)
    prepare_chats(place, tokenizer)
    tuning = recipe(place)
    rules = training_rules(sequence_parallel=False)
    mesh = make_mesh(tuning.mesh)
    model = build(tuning.model, mesh, rules, dtype="float32", remat="none")
    save_params(place / "base", model.init(seed=3), tuning.model, tokenizer)
    (place / "recipe.py").write_text(
        "from tests import runs\n\n\n"
        f"def tiny():\n    return runs.sft_recipe({str(place / 'rows')!r}, {LENGTH})\n"
    )
    return place


def recipe(place):
    return runs.sft_recipe(place / "rows", LENGTH)


def argv(place, workdir) -> list[str]:
    words = [f"{place}/recipe.py:tiny", "--workdir", str(workdir)]
    return [*words, "--init-from", str(place / "base")]


def losses(workdir) -> dict[int, float]:
    records = read_metrics(workdir / METRICS)
    return {r["step"]: r["loss"] for r in records if "loss" in r}


def test_two_hosts_fine_tune_as_one(place, tmp_path):
    assert sft(recipe(place), tmp_path / "one", init_from=place / "base")
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
