"""Reward models: how good an answer is, as one number (section 3.2).

B rows, T positions, R ratings, K kinds of pairs by safety, C bins.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float, Int
from numpy.typing import ArrayLike

from llama_jax.build import ShardedLlama, build
from llama_jax.config import LlamaConfig
from llama_jax.config.finetune import Margin
from llama_jax.config.recipe import RewardRecipe
from llama_jax.conversion import AnyCheckpoint, open_any
from llama_jax.data.batch import ComparisonBatch
from llama_jax.data.prepared import RATINGS, SAFE, UNSAFE
from llama_jax.errors import CheckpointError, DataError
from llama_jax.finetune.preference import MARGINS, ranking_loss, safety_loss
from llama_jax.generate.rows import length_bucket, num_rows_for, padded
from llama_jax.model import tiles
from llama_jax.model.flash import FlashAttention, FlashOrTiles
from llama_jax.model.transformer import Attend
from llama_jax.text import Tokenizer, encode_example
from llama_jax.text.chat import Message
from llama_jax.train.compiler import compiler_options
from llama_jax.train.metrics import Record
from llama_jax.train.objective import Objective, as_written, in_order
from llama_jax.train.run import Stage, run
from sharding import AxisRules, MeshConfig, axes, decoding_rules, hosts, make_mesh
from sharding.axes import Tree
from sharding.mesh import axis_size

# The kinds of pairs that the paper tells apart (section 3.2.1), and their labels.
_PAIRS_BY_SAFETY = {
    "safe and unsafe": (SAFE, UNSAFE),
    "both safe": (SAFE, SAFE),
    "both unsafe": (UNSAFE, UNSAFE),
}
# Of scores in (0, 1), and of how sure a model is that one answer is better.
_NUM_BINS = 20
# Rows that a device, or those that share its rows, scores at a time.
_ROWS = 8

# Parameters, int[B, T] and the place of each row's last token to its score, float32[B].
ScoresStep = Callable[[Tree, ArrayLike, ArrayLike], Array]


@dataclasses.dataclass(frozen=True)
class Preferences(Objective):
    """The chosen answer's score above that of the other; safe ones above 0.

    Attributes:
      margin: how far above, see `RewardConfig`.
      safety_weight: of the second part; see there.
    """

    margin: Margin
    safety_weight: float

    def loss(
        self, sharded: ShardedLlama, params: Tree, batch: ComparisonBatch
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The sum over the pairs of a batch, and how many there are."""
        scores_BT = _scores(sharded, params, batch)
        with jax.named_scope("loss"):
            return self._loss(scores_BT, batch), jnp.sum(batch.weights)

    def measure(
        self, sharded: ShardedLlama, params: Tree, batch: ComparisonBatch
    ) -> Mapping[str, Array]:
        """Sums, and counts by rating, by safety and by score."""
        scores_BT = _scores(sharded, params, batch)
        chosen_BT, weights_BT = jax.nn.sigmoid(scores_BT), batch.weights
        rejected_BT = _at(chosen_BT, batch.rejected)
        gap_BT = scores_BT - _at(scores_BT, batch.rejected)
        right_BT = weights_BT * (gap_BT > 0)
        sure_BT = jax.nn.sigmoid(jnp.abs(gap_BT))

        def count(is_in_BTx: Array, weights_BT: Array) -> Array:
            return jnp.sum(is_in_BTx * weights_BT[..., None], axis=(0, 1))

        rating_BTR = batch.rating[..., None] == jnp.arange(len(RATINGS))
        other_BT = _at(batch.safety, batch.rejected)
        safety_BTK = jnp.stack(
            [
                (batch.safety == chosen) & (other_BT == rejected)
                for chosen, rejected in _PAIRS_BY_SAFETY.values()
            ],
            axis=-1,
        )
        sure_BTC = _bins(2 * sure_BT - 1)  # it is never below 1/2
        unsafe_BT = (batch.safety == UNSAFE).astype(jnp.float32)
        return {
            "loss": self._loss(scores_BT, batch),
            "weight": jnp.sum(weights_BT),
            "rating": count(rating_BTR, weights_BT),
            "rating_right": count(rating_BTR, right_BT),
            "safety": count(safety_BTK, weights_BT),
            "safety_right": count(safety_BTK, right_BT),
            "unsafe": jnp.sum(unsafe_BT),
            "unsafe_found": jnp.sum(unsafe_BT * (scores_BT < 0)),
            "sure": count(sure_BTC, weights_BT),
            "sure_sum": count(sure_BTC, weights_BT * sure_BT),
            "sure_right": count(sure_BTC, right_BT),
            "chosen": count(_bins(chosen_BT), weights_BT),
            "rejected": count(_bins(rejected_BT), weights_BT),
        }

    def report(self, sums: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """As the paper reports them: see docs/chat.md.

        Accuracy is the share of pairs whose chosen answer has the higher score, of all
        and by rating (Table 8) and safety (Table 29); `unsafe_recall` the share of
        unsafe answers with σ(score) < 1/2 (Table 29). `calibration` has the accuracy
        of pairs by how sure the model is of them, σ(|gap|), and `calibration_error`
        the mean distance of the two. `scores` are shares of answers by σ(score), in
        bins of equal width (Figure 27).
        """
        ratings = [rating or "not rated" for rating in RATINGS]
        right = sums["rating_right"].sum() / max(sums["weight"], 1.0)
        bins = np.flatnonzero(sums["sure"])
        off = np.abs(sums["sure_sum"] - sums["sure_right"]).sum()
        return {
            **super().report(sums),
            "accuracy": float(right),
            "accuracy_by_rating": _shares(
                ratings, sums["rating_right"], sums["rating"]
            ),
            "accuracy_by_safety": _shares(
                _PAIRS_BY_SAFETY, sums["safety_right"], sums["safety"]
            ),
            "unsafe_recall": (
                float(sums["unsafe_found"] / sums["unsafe"]) if sums["unsafe"] else None
            ),
            "calibration": {
                "sure": (sums["sure_sum"][bins] / sums["sure"][bins]).tolist(),
                "right": (sums["sure_right"][bins] / sums["sure"][bins]).tolist(),
                "pairs": sums["sure"][bins].tolist(),
            },
            "calibration_error": float(off / max(sums["weight"], 1.0)),
            "scores": {
                answer: (sums[answer] / max(sums["weight"], 1.0)).tolist()
                for answer in ("chosen", "rejected")
            },
        }

    def _loss(self, scores_BT: Array, batch: ComparisonBatch) -> Array:
        rejected_BT = _at(scores_BT, batch.rejected)
        margin_BT = jnp.asarray(MARGINS[self.margin])[batch.rating]
        loss_BT = batch.weights * ranking_loss(scores_BT, rejected_BT, margin_BT)
        if self.safety_weight:
            labelled_BT = self.safety_weight * (batch.safety > 0)
            loss_BT += labelled_BT * safety_loss(scores_BT, batch.safety == SAFE)
        return jnp.sum(loss_BT)


def _scores(
    sharded: ShardedLlama, params: Tree, batch: ComparisonBatch
) -> Float[Array, "B T"]:
    read, positions_1T = in_order(sharded, (batch.tokens, batch.segments))
    scores_BT: Any = sharded.model.apply({"params": params}, *read, positions_1T)
    return as_written(sharded, scores_BT)


def _at(x_BT: Array, position_BT: Int[Array, "B T"]) -> Array:
    return jnp.take_along_axis(x_BT, position_BT, axis=1)


def _bins(x_BT: Float[Array, "B T"]) -> Array:
    """Which bin of (0, 1) a number is in, [B, T, C]."""
    bin_BT = jnp.minimum((x_BT * _NUM_BINS).astype(jnp.int32), _NUM_BINS - 1)
    return bin_BT[..., None] == jnp.arange(_NUM_BINS)


def _shares(
    names: Sequence[str] | Mapping[str, Any], part: np.ndarray, whole: np.ndarray
) -> dict[str, float]:
    """Of what there is any."""
    return {
        name: float(p / w) for name, p, w in zip(names, part, whole, strict=True) if w
    }


def _objective(recipe: RewardRecipe) -> Preferences:
    return Preferences(recipe.reward.margin, recipe.reward.safety_weight)


STAGE = Stage(reads="comparisons", needs_model=True, objective=_objective)


def train_reward(
    recipe: RewardRecipe,
    workdir: epath.PathLike,
    *,
    init_from: epath.PathLike | None = None,
    profile: tuple[int, int] | None = None,
    watch: Callable[[Record], None] = lambda record: None,
) -> bool:
    """Teach a model to tell the better of two answers, or go on with that.

    It begins with the chat model of `init_from`, whose last layer gives way to one of a
    single number, or with the newest checkpoint in `workdir`. Arguments, result and
    errors are those of `train.pretrain.pretrain`.

    Raises:
      CheckpointError: there is neither.
      DataError: the data are no comparisons, or were made with another tokenizer.
    """
    return run(
        STAGE, recipe, workdir, init_from=init_from, profile=profile, watch=watch
    )


class RewardModel:
    """Scores answers.

    Args:
      sharded: the model and its mesh, with rules that split no sequence.
      params: laid out as `sharded.param_shardings` says.
      tokenizer: reads the dialogs.
    """

    def __init__(
        self, sharded: ShardedLlama, params: Tree, tokenizer: Tokenizer
    ) -> None:
        assert sharded.head == "scalar"
        self.sharded = sharded
        self.params = params
        self.tokenizer = tokenizer
        self._last_scores = make_scores(sharded)

    def score(
        self, dialogs: Sequence[Sequence[Message]]
    ) -> Float[np.ndarray, " dialogs"]:
        """How good the last answer of each dialog is; σ(score) is in (0, 1).

        Raises:
          DialogError: a dialog does not end with an answer, or is none.
          DataError: a dialog is longer than the model reads.
        """
        return self.score_ids(
            [encode_example(self.tokenizer, dialog).tokens for dialog in dialogs]
        )

    def score_ids(self, rows: Sequence[Sequence[int]]) -> Float[np.ndarray, " rows"]:
        """`score` of dialogs as ids, each to the EOS of its last answer.

        Raises:
          DataError: a row is longer than the model reads.
        """
        longest = self.sharded.config.max_length
        for i, row in enumerate(rows):
            if not 0 < len(row) <= longest:
                raise DataError(
                    f"dialog {i} has {len(row)} tokens, and the reward model reads 1 "
                    f"to {longest}: shorten it."
                )
        # Of like length together, so that little of a batch is padding.
        order = np.argsort([len(row) for row in rows], kind="stable")
        scores = np.zeros(len(rows), np.float32)
        at_once = rows_at_once(self.sharded)
        for start in range(0, len(rows), at_once):
            chosen = order[start : start + at_once]
            scores[chosen] = self._score([rows[i] for i in chosen])
        return scores

    def _score(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        sharded = self.sharded
        length = length_bucket(max(map(len, rows)), sharded.config.max_length)
        num_rows = num_rows_for(sharded, len(rows))
        last = np.zeros(num_rows, np.int32)
        last[: len(rows)] = [len(row) - 1 for row in rows]
        with jax.set_mesh(sharded.mesh):
            scores = self._last_scores(
                self.params, padded(rows, num_rows, length), last
            )
        return np.asarray(scores)[: len(rows)]


def rows_at_once(sharded: ShardedLlama) -> int:
    """Rows that a reward model scores at a time, at most."""
    return _ROWS * axis_size(sharded.mesh, sharded.rules.mesh_axes(axes.BATCH))


def make_scores(sharded: ShardedLlama) -> ScoresStep:
    """Compiled, once for all models of one form: the score at each row's last token."""
    model: Any = sharded.model
    return _compiled_scores(model, sharded.mesh)


@functools.cache
def _compiled_scores(model: Any, mesh: jax.sharding.Mesh) -> ScoresStep:
    def scores(params: Tree, tokens_BT: Array, last_B: Array) -> Float[Array, " B"]:
        tokens_BT = model.constrain(tokens_BT, axes.BATCH, None)
        scores_BT = model.apply({"params": params}, tokens_BT)
        scores_B = jnp.take_along_axis(scores_BT, last_B[:, None], axis=1)[:, 0]
        return model.constrain(scores_B, None)  # so that every host can read it

    return jax.jit(scores, compiler_options=compiler_options(mesh))


def open_reward(path: epath.PathLike) -> tuple[AnyCheckpoint, Tokenizer]:
    """Open the checkpoint of a reward model, without reading its weights.

    Raises:
      CheckpointError: as `load_reward`.
    """
    source = open_any(path, max_length=4096)
    if source.head != "scalar":
        raise CheckpointError(
            f"{path} is a model that writes, and no reward model: give the work "
            "directory of one."
        )
    if source.tokenizer_path is None:
        raise CheckpointError(
            f"{path} has lost its tokenizer.model, without which dialogs cannot be "
            "read: copy that of the chat model there."
        )
    return source, Tokenizer(source.tokenizer_path)


def load_reward(
    path: epath.PathLike,
    *,
    mesh: jax.sharding.Mesh | None = None,
    dtype: str = "float32",
) -> RewardModel:
    """Load a reward model that `train_reward` made.

    Args:
      path: the work directory of its run.
      mesh: the devices; None takes the first one.
      dtype: of weights and arithmetic, "float32" or "bfloat16".

    Raises:
      CheckpointError: it is none, is damaged, or has no tokenizer.
      ShardingError: the mesh does not divide the model.
    """
    hosts.cache_compilations()
    with hosts.failing_together():
        source, tokenizer = open_reward(path)
    if mesh is None:
        mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    sharded = build_reward(source.config, mesh, dtype=dtype)
    params = source.load(sharded.param_shardings, dtype=jnp.dtype(dtype))
    return RewardModel(sharded, params, tokenizer)


def build_reward(
    config: LlamaConfig, mesh: jax.sharding.Mesh, *, dtype: str
) -> ShardedLlama:
    """The model of a `RewardModel`; arguments and errors are those of `load_reward`."""
    rules = decoding_rules()
    return build(
        config,
        mesh,
        rules,
        dtype=dtype,
        remat="none",
        attend=_attention(mesh, rules),
        head="scalar",
    )


def _attention(mesh: jax.sharding.Mesh, rules: AxisRules) -> Attend:
    """Whose memory does not grow with the square of a row; on TPUs the kernel."""
    if mesh.devices.flat[0].platform != "tpu":
        return tiles.attend
    return FlashOrTiles(flash=FlashAttention(mesh=mesh, rules=rules))
