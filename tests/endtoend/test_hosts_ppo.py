"""PPO on two hosts: they answer together, and learn as one host alone does."""

import numpy as np
import pytest

from llama_jax.finetune.ppo import ppo
from llama_jax.train.metrics import METRICS, read_metrics
from tests import runs
from tests.data import corpus
from tests.data.prompts import LENGTH, prepare_questions
from tests.endtoend import jobs
from tests.endtoend.jobs import Job
from tests.finetune.conftest import save_untrained
from tests.finetune.test_ppo import save_reward
from tests.parity import tolerances

pytestmark = pytest.mark.slow

# Many programs are compiled on each host.
SECONDS = 420


def recipe(place):
    return runs.ppo_recipe(
        f"{place}/rows", LENGTH, helpfulness=f"{place}/helpful", safety=f"{place}/safe"
    )


def told(workdir, name) -> list[float]:
    return [r[name] for r in read_metrics(workdir / METRICS) if name in r]


def test_two_hosts_learn_as_one(tmp_path, monkeypatch):
    tokenizer = corpus.make_tokenizer(tmp_path)
    prepare_questions(tmp_path, tokenizer)
    save_untrained(tmp_path / "base", tokenizer)
    save_reward(tmp_path / "helpful", tokenizer)
    save_reward(tmp_path / "safe", tokenizer, seed=5)
    (tmp_path / "recipe.py").write_text(
        "from tests.endtoend.test_hosts_ppo import recipe\n\n\n"
        f"def tiny():\n    return recipe({str(tmp_path)!r})\n"
    )
    words = [f"{tmp_path}/recipe.py:tiny", "--workdir", str(tmp_path / "two")]
    words += ["--init-from", str(tmp_path / "base")]
    monkeypatch.setattr(jobs, "SECONDS", SECONDS)
    with Job(tmp_path / "logs", words, words) as job:
        assert job.ends() == [0, 0], job.everything()
    assert ppo(recipe(tmp_path), tmp_path / "one", init_from=tmp_path / "base")

    for name in (
        "reward",
        "kl",
        "loss",
        "value_loss",
        "validation_reward",
        "validation_kl",
    ):
        alone, together = (told(tmp_path / hosts, name) for hosts in ("one", "two"))
        assert alone and together == pytest.approx(alone, abs=tolerances.ORDER_LOSS)
    before, after = (runs.saved(tmp_path / hosts, 8) for hosts in ("one", "two"))
    for name in before:
        bound = tolerances.ORDER_PARAMS_RELATIVE * np.abs(before[name]).max()
        np.testing.assert_allclose(
            after[name], before[name], rtol=0, atol=bound, err_msg=name
        )


# Scores of each host: 1 and 3, 5 and 99, of which the last one does not count.
WHITEN = """
import jax
import numpy as np
from llama_jax.finetune.estimators import whiten
from sharding import hosts

hosts.start()
mesh = jax.make_mesh((8,), ("data",))
split, whole = (
    jax.sharding.NamedSharding(mesh, jax.P(axis)) for axis in ("data", None)
)
scores = [[1, 3, 0, 0], [5, 99, 0, 0]][jax.process_index()]
weights = [[1, 1, 0, 0], [1, 0, 0, 0]][jax.process_index()]
given = (
    jax.make_array_from_process_local_data(split, np.array(own, np.float32))
    for own in (scores, weights)
)
print("white", *np.asarray(jax.jit(whiten, out_shardings=whole)(*given)))
"""


def test_scores_of_all_hosts_are_whitened_together(tmp_path):
    """1, 3 and 5 have the mean 3 and the variance 8 / 3."""
    with Job(tmp_path, [], [], programs=dict.fromkeys((0, 1), WHITEN)) as job:
        assert job.ends() == [0, 0], job.everything()
        for host in (0, 1):
            (line,) = (x for x in job.said(host).splitlines() if x.startswith("white"))
            found = np.array(line.split()[1:], float)
            expected = [-np.sqrt(1.5), 0, 0, 0, np.sqrt(1.5), 0, 0, 0]
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
