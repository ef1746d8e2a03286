"""Roll-outs: a policy's answers to prompts, and what reward models say of them.

Parameters lie for training as float32, split over every device; a model that decodes
from that layout gathers all of its weights for every token, which made the paper's
generation about 20 times as slow (section 3.2.3). Here they move once, in the type of
the arithmetic, to a mesh for decoding: see `reshard`.

Shape suffixes: B rows, T position, t = T - 1, D model width, V vocabulary.
"""

import dataclasses
import functools
import hashlib
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int
from numpy.typing import ArrayLike

from llama_jax.build import ShardedLlama, build
from llama_jax.config.sampling import Sampler
from llama_jax.data import Prompt
from llama_jax.errors import (
    ConfigError,
    DataError,
    DialogError,
    GenerationError,
    TokenizerError,
)
from llama_jax.finetune.answers import require_learnable
from llama_jax.finetune.estimators import combined_scores
from llama_jax.finetune.reward import RewardModel, load_reward, open_reward
from llama_jax.generate import Completion, Engine, Generator, Settings
from llama_jax.generate.weights import from_params
from llama_jax.model.transformer import matmul_precision
from llama_jax.text import Tokenizer, encode_dialog
from llama_jax.text.chat import Message
from llama_jax.train.compiler import compiler_options
from llama_jax.train.objective import as_written, in_order
from sharding import ShardingError, axes, decoding_rules
from sharding.axes import Tree

# Positions whose logits exist at one time: all of them would outweigh the model.
_POSITIONS = 128

# The safety score below which it is the one that counts (section 3.2.3).
THRESHOLD = 0.15


@dataclasses.dataclass(frozen=True)
class Resharding:
    """What it cost to lay parameters out for decoding.

    Attributes:
      seconds: until the last weight was there; the first time, compiling included.
      num_bytes: of the copy, on all devices together.
    """

    seconds: float
    num_bytes: int

    def __str__(self) -> str:
        rate = self.num_bytes / self.seconds
        return (
            f"resharded {self.num_bytes / 1e9:.3g} GB in {self.seconds:.3g} s, "
            f"{rate / 1e9:.3g} GB/s"
        )


def reshard(
    sharded: ShardedLlama,
    params: Tree,
    mesh: jax.sharding.Mesh,
    *,
    cache_length: int | None = None,
) -> tuple[Engine, Resharding]:
    """Copy parameters from their layout for training to one for decoding.

    Each layer is rounded to the type of the arithmetic where it lies, and then moves
    from device to device: half of the bytes in bfloat16, and none of them over a host.
    Beside parameters, which stay as they are, and copy, there is memory for no more
    than one layer and the unembedding. The copy lives as long as the engine: drop that
    before training goes on.

    Args:
      sharded: the model as it is trained.
      params: laid out as `sharded.param_shardings` says.
      mesh: the same devices for decoding: as many along `tensor` as hold the weights,
        the rest along `data`, where each group answers other prompts. Along `fsdp`
        weights would stay split, and be gathered for every token.
      cache_length: positions of a row, prompt and answer; None is the whole context.

    Raises:
      GenerationError: `cache_length` is not within the context.
      ShardingError: the mesh has other devices, or does not divide the model.
    """
    assert sharded.head == "unembed", sharded.head
    if set(mesh.devices.flat) != set(sharded.mesh.devices.flat):
        raise ShardingError(
            f"the mesh for decoding has {mesh.size} devices, and not those "
            f"{sharded.mesh.size} that train: make it of "
            "list(sharded.mesh.devices.flat), so that weights need not leave them."
        )
    jax.block_until_ready(params)
    began = time.perf_counter()
    dtype = sharded.model.dtype
    decoding = build(sharded.config, mesh, decoding_rules(), dtype=dtype, remat="none")
    places = decoding.param_shardings
    moving: dict[str, Tree] = {
        name: jax.tree.map(
            # Layers wait until `from_params` asks for them, one after the other.
            functools.partial(_Layers if name == "blocks" else _moved, dtype),
            params[name],
            places[name],
        )
        for name in params
    }
    weights = from_params(decoding, moving, int8=False)
    jax.block_until_ready(weights)
    num_bytes = mesh.size * sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(weights)
    )
    cost = Resharding(time.perf_counter() - began, num_bytes)
    return Engine(decoding, weights, slots=cache_length), cost


class _Layers:
    """A stacked leaf whose layers are moved when they are asked for."""

    def __init__(self, dtype: jnp.dtype, leaf: jax.Array, place: NamedSharding) -> None:
        self._leaf, self._place, self._dtype = leaf, place, dtype

    def __getitem__(self, number: int) -> jax.Array:
        layer = _rounded(self._leaf, self._dtype, number)
        return _laid_out(layer, _of_a_layer(self._place))


def _moved(dtype: jnp.dtype, leaf: jax.Array, place: NamedSharding) -> jax.Array:
    return _laid_out(_rounded(leaf, dtype, None), place)


def _rounded(leaf: jax.Array, dtype: jnp.dtype, number: int | None) -> jax.Array:
    """A leaf, or its layer of this number, where it lies."""
    home, mesh = _home(leaf)
    place = home if number is None else _of_a_layer(home)
    with jax.set_mesh(mesh):
        return _rounder(place, dtype)(leaf, number)


@functools.cache
def _rounder(place: NamedSharding, dtype: jnp.dtype) -> Callable[..., jax.Array]:
    def rounded(leaf: jax.Array, number: int | None) -> jax.Array:
        return (leaf if number is None else leaf[number]).astype(dtype)

    return jax.jit(rounded, out_shardings=place)


def _laid_out(x: jax.Array, place: NamedSharding) -> jax.Array:
    """On the devices of another mesh, by their own links.

    Where as many devices share a matrix as before, each gathers its own part. Else the
    matrix is whole on all of them for a moment, and each keeps its part: XLA knows no
    other way, and would only complain before it went the same.
    """
    _, mesh = _home(x)
    whole = NamedSharding(place.mesh, jax.P())
    if list(mesh.devices.flat) != list(place.mesh.devices.flat):
        x = jax.block_until_ready(jax.device_put(x, whole))
    elif mesh.shape[axes.TENSOR] != place.mesh.shape[axes.TENSOR]:
        x = jax.block_until_ready(jax.jit(_same, out_shardings=whole)(x))
    # Not by `device_put`, which goes over the host where the devices have one order.
    # And one after the other: memory is taken when a program is sent off, not when it
    # runs; and CPUs run them at a time, where one waits for the threads of another.
    return jax.block_until_ready(jax.jit(_same, out_shardings=place)(x))


def _same(x: jax.Array) -> jax.Array:
    return x


def _home(x: jax.Array) -> tuple[NamedSharding, jax.sharding.Mesh]:
    sharding = x.sharding
    assert isinstance(sharding, NamedSharding), sharding
    assert isinstance(sharding.mesh, jax.sharding.Mesh), sharding
    return sharding, sharding.mesh


def _of_a_layer(place: NamedSharding) -> NamedSharding:
    return NamedSharding(place.mesh, jax.P(*place.spec[1:]))


# Two trees of parameters and int[B, T] to the log-probabilities, float32[B, t], under
# each.
LogprobsStep = Callable[[Tree, Tree, ArrayLike], tuple[Array, Array]]


def make_logprobs(sharded: ShardedLlama) -> LogprobsStep:
    """Compiled: what rows are worth under the policy and under its reference.

    Both lie as in training, and model, kernels and types are those of the training
    step: so the first ratio of new to old probabilities is 1 but for the order of sums,
    which those that generation finds would miss by its roundings. Probabilities are of
    temperature 1, with nothing cut off.

    The results are whole on every device. Rows are as many as the mesh divides, and
    what the caller has room for. Called inside `jax.set_mesh(sharded.mesh)`.
    """

    def step(
        policy: Tree, reference: Tree, tokens_BT: Array
    ) -> tuple[Float[Array, "B t"], Float[Array, "B t"]]:
        return (
            token_logprobs(sharded, policy, tokens_BT),
            token_logprobs(sharded, reference, tokens_BT),
        )

    return jax.jit(
        step,
        # Rows may lie anywhere, or be NumPy's, the same on every host.
        in_shardings=(sharded.param_shardings, sharded.param_shardings, None),
        out_shardings=sharded.sharding(),
        compiler_options=compiler_options(sharded.mesh),
    )


def token_logprobs(
    sharded: ShardedLlama, params: Tree, tokens_BT: Int[Array, "B T"]
) -> Float[Array, "B t"]:
    """The log-probability, in nats, of each token of each row but its first.

    Part of a program on the mesh of `sharded`. Behind the end of a row it means
    nothing, and changes nothing before. Logits exist for few positions at a time.

    Args:
      sharded: the model, of any rules.
      params: laid out as `sharded.param_shardings` says.
      tokens_BT: rows padded at their ends, as many as the mesh divides.
    """
    model, constrain = sharded.model, sharded.model.constrain
    tokens_BT = constrain(tokens_BT, axes.BATCH, None)
    next_BT = jnp.roll(tokens_BT, -1, axis=1)
    (tokens_BT, next_BT), positions_1T = in_order(sharded, (tokens_BT, next_BT))
    hidden_BTD: Any = model.apply(
        {"params": params}, tokens_BT, None, positions_1T, method="hidden"
    )
    # Gathered over `fsdp` once, and not for every part of the positions.
    kernel_DV = params["unembed"]["kernel"].astype(model.dtype)
    kernel_DV = constrain(kernel_DV, None, axes.VOCAB)

    def logprob(position: tuple[Array, Array]) -> Float[Array, " B"]:
        x_BD, next_B = position
        logits_BV = jnp.einsum(
            "BD,DV->BV", x_BD, kernel_DV, preferred_element_type=jnp.float32
        )
        logits_BV = constrain(logits_BV, axes.BATCH, axes.VOCAB)
        # A comparison instead of a gather: see `next_token_loss`.
        hit_BV = next_B[:, None] == jnp.arange(logits_BV.shape[1])
        target_B = jnp.sum(jnp.where(hit_BV, logits_BV, 0.0), axis=1)
        return target_B - jax.nn.logsumexp(logits_BV, axis=1)

    by_position = (
        constrain(hidden_BTD, axes.BATCH, None, None).swapaxes(0, 1),
        constrain(next_BT, axes.BATCH, None).T,
    )
    with matmul_precision(model.dtype):
        logprob_TB = jax.lax.map(logprob, by_position, batch_size=_POSITIONS)
    logprob_BT = constrain(logprob_TB.T, axes.BATCH, axes.SEQUENCE)
    return as_written(sharded, logprob_BT)[:, :-1]


class Scores(NamedTuple):
    """Of answers, all before the sigmoid.

    Attributes:
      safety: by the safety reward model.
      helpfulness: by the helpfulness reward model.
      combined: the one of them that counts, logit(Rc).
    """

    safety: Float[np.ndarray, " answers"]
    helpfulness: Float[np.ndarray, " answers"]
    combined: Float[np.ndarray, " answers"]


@dataclasses.dataclass(frozen=True)
class Judge:
    """Both reward models, and how two scores become one (section 3.2.3).

    The paper gives the rule for PPO; that rejection sampling chooses by it is ours.

    Attributes:
      safety: scores how safe an answer is.
      helpfulness: scores how helpful it is.
      threshold: probability of being safe below which that alone counts.

    Raises:
      ConfigError: the threshold is no probability.
      TokenizerError: the models have two tokenizers.
    """

    safety: RewardModel
    helpfulness: RewardModel
    threshold: float = THRESHOLD

    def __post_init__(self) -> None:
        _require_judge(
            self.safety.tokenizer, self.helpfulness.tokenizer, self.threshold
        )

    @property
    def tokenizer(self) -> Tokenizer:
        """That of both models."""
        return self.safety.tokenizer

    @property
    def max_length(self) -> int:
        """Tokens that both models read."""
        models = (self.safety, self.helpfulness)
        return min(model.sharded.config.max_length for model in models)

    def scores(
        self, rows: Sequence[Sequence[int]], about_safety: Sequence[bool]
    ) -> Scores:
        """Of dialogs as ids, each to the EOS of its last answer.

        Args:
          rows: the ids.
          about_safety: of each, whether its prompt is there to elicit what is unsafe.

        Raises:
          DataError: a row is longer than a model reads, or a score is no number.
        """
        safety = finite_scores("safety", self.safety, rows)
        helpfulness = finite_scores("helpfulness", self.helpfulness, rows)
        combined = combined_scores(
            jnp.asarray(safety),
            jnp.asarray(helpfulness),
            jnp.asarray(about_safety, bool),
            threshold=self.threshold,
        )
        return Scores(safety, helpfulness, np.asarray(combined))

    def facts(self) -> dict[str, Any]:
        """What scores depend on, for a manifest: which models, and the threshold."""
        return {
            "safety_model": checksum(self.safety.params, self.safety.sharded.mesh),
            "helpfulness_model": checksum(
                self.helpfulness.params, self.helpfulness.sharded.mesh
            ),
            "threshold": self.threshold,
        }


def load_judge(
    *,
    safety: epath.PathLike,
    helpfulness: epath.PathLike,
    threshold: float,
    mesh: jax.sharding.Mesh,
    dtype: str,
) -> Judge:
    """Load both reward models on one mesh.

    Raises:
      CheckpointError, ShardingError: as `reward.load_reward`.
      ConfigError, TokenizerError: as `Judge`.
    """
    return Judge(
        safety=load_reward(safety, mesh=mesh, dtype=dtype),
        helpfulness=load_reward(helpfulness, mesh=mesh, dtype=dtype),
        threshold=threshold,
    )


def check_judge(
    *,
    safety: epath.PathLike,
    helpfulness: epath.PathLike,
    threshold: float,
    policy: Tokenizer | None,
) -> None:
    """Check what `load_judge` is given, without reading weights.

    Args:
      safety: as `load_judge` has it; and so are the next two.
      helpfulness: likewise.
      threshold: likewise.
      policy: the tokenizer of the model whose answers are scored, if it is known.

    Raises:
      CheckpointError: one is no reward model, is damaged, or has no tokenizer.
      ConfigError, TokenizerError: as `Judge`; or the policy's tokenizer is another.
    """
    (_, reads), (_, other) = open_reward(safety), open_reward(helpfulness)
    _require_judge(reads, other, threshold)
    if policy is not None:
        require_one_tokenizer(policy, reads)


def finite_scores(
    name: str, model: RewardModel, rows: Sequence[Sequence[int]]
) -> Float[np.ndarray, " rows"]:
    """`RewardModel.score_ids`, of a model that gives numbers.

    Raises:
      DataError: it does not; or a row is longer than it reads.
    """
    scores = model.score_ids(rows)
    if not np.isfinite(scores).all():
        raise DataError(
            f"the {name} reward model gives an answer the score "
            f"{scores[~np.isfinite(scores)][0]}: its weights are damaged, or its "
            "training failed; inspect its checkpoint."
        )
    return scores


class Answer(NamedTuple):
    """What was sampled.

    Attributes:
      text: as it stands in a dialog, without white space around it.
      tokens: as they were drawn after the prompt, with the EOS if there is one.
      is_whole: whether the policy ended it with EOS; else it was cut.
    """

    text: str
    tokens: Sequence[int]
    is_whole: bool


class Rollout(NamedTuple):
    """A prompt, the answers to it, and what these are worth.

    Attributes:
      prompt: what was asked.
      prompt_tokens: its ids, before those of any answer.
      answers: in the order in which they were drawn.
      scores: one of each kind for each.
    """

    prompt: Prompt
    prompt_tokens: Sequence[int]
    answers: Sequence[Answer]
    scores: Scores


def roll_out(
    generator: Generator,
    judge: Judge,
    prompts: Sequence[Prompt],
    *,
    num_samples: int,
    max_new_tokens: int,
    sampler: Sampler,
    seed: int | Sequence[int],
) -> list[Rollout]:
    """Answer prompts, all at once, and score the answers.

    On several hosts, all of them do this together, and have the same results. What a
    prompt is answered with depends on it and on the seed, not on those beside it, nor
    does its score, but for the last bits.

    Scores are of the ids that were drawn. An answer that is cut is scored as if it
    ended there: with EOS for its last token, as reward models have learnt to read
    nothing else. The paper is silent on such answers; this is ours, and so is that
    `rejection` never chooses them.

    Args:
      generator: the policy, on the mesh for decoding.
      judge: scores.
      prompts: what to answer.
      num_samples: answers to each.
      max_new_tokens: of an answer, EOS included.
      sampler: `TopP(1.0, temperature=...)` draws from the distribution as it is.
      seed: of the samples, or one for each prompt.

    Raises:
      DataError: the reward models do not read rows so long, or give no numbers.
      DialogError: a prompt is none; the message says which.
      GenerationError: a prompt leaves no room for an answer, or a setting is none.
      TokenizerError: policy and reward models have different tokenizers.
    """
    settings = Settings(max_new_tokens=max_new_tokens, sampler=sampler, seed=seed)
    encoded = encode_prompts(generator, judge, prompts, max_new_tokens=max_new_tokens)
    if not encoded:
        return []
    eos = judge.tokenizer.eos_id
    answers = [
        _answer(completion, eos)
        for completion in generator.generate(encoded, settings, num_samples=num_samples)
    ]
    numbers = [i for i in range(len(prompts)) for _ in range(num_samples)]
    scores = judge.scores(
        [
            [*encoded[number], *answer.tokens[:-1], eos]
            for number, answer in zip(numbers, answers, strict=True)
        ],
        [prompts[number].about_safety for number in numbers],
    )
    rollouts = []
    for i, (prompt, ids) in enumerate(zip(prompts, encoded, strict=True)):
        own = slice(i * num_samples, (i + 1) * num_samples)
        of_each = Scores(*(kind[own] for kind in scores))
        rollouts.append(Rollout(prompt, ids, answers[own], of_each))
    return rollouts


def encode_prompts(
    generator: Generator,
    judge: Judge,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
) -> list[list[int]]:
    """The ids of prompts, all of which can be answered, scored and learnt.

    Raises:
      DataError, DialogError, GenerationError, TokenizerError: as `roll_out`.
    """
    tokenizer = generator.require_tokenizer("a dialog")
    require_one_tokenizer(tokenizer, judge.tokenizer)
    slots, readable = generator.engine.slots, judge.max_length
    encoded = []
    for i, prompt in enumerate(prompts):
        try:
            ids = _encode(tokenizer, prompt.messages)
        except (DialogError, TokenizerError) as error:
            raise type(error)(f"prompts[{i}]: {error}") from None
        if len(ids) >= slots:
            raise GenerationError(
                f"prompts[{i}] has {len(ids)} tokens, and a row has room for {slots}, "
                "prompt and answer together: leave it out, or raise cache_length "
                "(--cache-length)."
            )
        if (longest := min(len(ids) + max_new_tokens, slots)) > readable:
            raise DataError(
                f"prompts[{i}] has {len(ids)} tokens, and {longest} with an answer, "
                f"but the reward models read {readable}: leave it out, or let "
                f"max_new_tokens be at most {readable - len(ids)}."
            )
        encoded.append(ids)
    return encoded


def require_one_tokenizer(policy: Tokenizer, reads: Tokenizer) -> None:
    """Check that reward models read what a policy writes.

    Raises:
      TokenizerError: they have another tokenizer.
    """
    _require_same(
        policy, reads, "the policy and the reward models have different tokenizers"
    )


def checksum(tree: Any, mesh: jax.sharding.Mesh) -> str:
    """Of the bits of all arrays, wherever they lie: which model was it?

    A sum over numbers, so that neither order nor mesh counts, and no array leaves its
    devices; of each the bits are mixed first (MurmurHash3's last step), as twice the
    weights would else have the same sum.
    """
    with jax.set_mesh(mesh):
        sums = jax.jit(_sums, out_shardings=NamedSharding(mesh, jax.P()))(tree)
    return hashlib.sha256(np.asarray(sums).tobytes()).hexdigest()[:16]


def _sums(tree: Any) -> Array:
    def total(x: jax.Array) -> Array:
        kind = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32)
        bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
        bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
        return jnp.sum(bits ^ (bits >> 16), dtype=jnp.uint32)

    return jnp.stack([total(leaf) for leaf in jax.tree.leaves(tree)])


def _answer(completion: Completion, eos: int) -> Answer:
    is_whole = completion.finish_reason == "stop"
    ends = [eos] if is_whole else []
    return Answer(completion.text.strip(), [*completion.tokens, *ends], is_whole)


def _encode(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    ids = encode_dialog(tokenizer, messages)
    require_learnable(messages, "?")
    return ids


def _require_judge(safety: Tokenizer, helpfulness: Tokenizer, threshold: float) -> None:
    if not 0 < threshold < 1:
        raise ConfigError(
            f"threshold is {threshold!r}: it is a probability, above 0 and below 1; "
            f"the paper's is {THRESHOLD}."
        )
    _require_same(
        helpfulness, safety, "the two reward models have different tokenizers"
    )


def _require_same(one: Tokenizer, other: Tokenizer, problem: str) -> None:
    if one.digest != other.digest:
        raise TokenizerError(
            f"{problem}, so that ids of the one mean other text to the other: train "
            "reward models from the chat model whose answers they score."
        )
