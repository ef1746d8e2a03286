"""PPO: a policy that learns from the rewards of its own answers (section 3.2.3).

An iteration answers prompts with the policy as it is, lets both reward models score the
answers (`experience`), and takes a few steps of policy and critic on them.

    WORKDIR/ppo.json                    what the run began with, and its sizes
    WORKDIR/checkpoints/STEP/params     the policy
    WORKDIR/checkpoints/STEP/optimizer  all else that changes, and what is being learnt

B rows of a step, T positions, P prompts of an iteration.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Array, Float
from numpy.typing import ArrayLike

from llama_jax.build import ShardedLlama, build, params_layout
from llama_jax.checkpoint.manager import RunCheckpoints
from llama_jax.checkpoint.params import TOKENIZER, place
from llama_jax.config import LlamaConfig
from llama_jax.config.recipe import PpoRecipe
from llama_jax.config.train import OptimizerConfig
from llama_jax.conversion import AnyCheckpoint, open_any
from llama_jax.data import (
    Experience,
    Prepared,
    PromptBatch,
    TrainingData,
    ValidationData,
)
from llama_jax.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    TokenizerError,
    TrainingError,
)
from llama_jax.finetune.estimators import (
    PolicySums,
    ValueSums,
    clipped_policy_loss,
    clipped_value_loss,
)
from llama_jax.finetune.experience import (
    LearntStep,
    Reader,
    ValuesStep,
    gather,
    held_out_pass,
    make_learnt,
    make_rows,
    make_values,
    nothing_learnt,
)
from llama_jax.finetune.ppo_state import (
    PLAN,
    Best,
    PpoState,
    began_as,
    from_ppo_items,
    plan_of,
    ppo_items,
    require_plan,
)
from llama_jax.finetune.reward import RewardModel, load_reward
from llama_jax.finetune.rollout import Judge, LogprobsStep, make_logprobs
from llama_jax.text import Tokenizer
from llama_jax.train import faults
from llama_jax.train.loop import profiler
from llama_jax.train.metrics import Record, Sink, Stopwatch
from llama_jax.train.objective import Objective, in_order, token_surprise
from llama_jax.train.optimizer import make_optimizer, make_schedule
from llama_jax.train.run import (
    Stage,
    agreed_data,
    built,
    hosts_joined,
    keep_tokenizer,
    load_params,
    open_model,
)
from llama_jax.train.state import (
    abstract_state,
    fresh_state,
)
from llama_jax.train.step import (
    EvalStep,
    Measured,
    TrainStep,
    make_eval_step,
    make_train_step,
)
from sharding import decoding_rules, hosts
from sharding.axes import Tree
from sharding.mesh import decoding_mesh

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PolicyObjective(Objective):
    """Answers that are better than expected, more probable: the clipped ratio.

    Attributes:
      clip: see `PpoConfig`.
    """

    clip: float

    def loss(
        self, sharded: ShardedLlama, params: Tree, batch: Experience
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The sum over tokens of answers, and how many there are."""
        sums = self._sums(sharded, params, batch)
        return sums.loss, sums.weight

    def measure(
        self, sharded: ShardedLlama, params: Tree, batch: Experience
    ) -> Mapping[str, Array]:
        """See `PolicySums`."""
        return self._sums(sharded, params, batch)._asdict()

    def report(self, sums: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """The share of tokens whose ratio is clipped, and D_KL(old || new) a token."""
        weight = max(sums["weight"], 1.0)
        return {
            "clipped": float(sums["clipped"] / weight),
            "update_kl": float(sums["kl"] / weight),
        }

    def _sums(
        self, sharded: ShardedLlama, params: Tree, batch: Experience
    ) -> PolicySums:
        batch, positions_1T = in_order(sharded, batch)
        surprise_BT = token_surprise(
            sharded, params, batch.tokens, batch.targets, None, positions_1T
        )
        with jax.named_scope("loss"):
            return clipped_policy_loss(
                -surprise_BT,
                batch.logprobs,
                batch.advantages,
                batch.mask,
                clip=self.clip,
            )


@dataclasses.dataclass(frozen=True)
class ValueObjective(Objective):
    """Values near to the returns that came of it, and not too far from the old ones.

    Attributes:
      clip: see `PpoConfig.value_clip`.
    """

    clip: float

    def loss(
        self, sharded: ShardedLlama, params: Tree, batch: Experience
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The sum over tokens of answers, and how many there are."""
        sums = self._sums(sharded, params, batch)
        return sums.loss, sums.weight

    def _sums(
        self, sharded: ShardedLlama, params: Tree, batch: Experience
    ) -> ValueSums:
        batch, positions_1T = in_order(sharded, batch)
        read = {"params": params}, batch.tokens, None, positions_1T
        values_BT: Any = sharded.model.apply(*read)
        with jax.named_scope("loss"):
            return clipped_value_loss(
                values_BT, batch.values, batch.returns, batch.mask, clip=self.clip
            )


def _objective(recipe: PpoRecipe) -> PolicyObjective:
    return PolicyObjective(recipe.ppo.clip)


STAGE = Stage(reads="prompts", needs_model=True, objective=_objective)


@dataclasses.dataclass(frozen=True)
class Programs:
    """All that is compiled, of a recipe and the models on their mesh.

    Attributes:
      policy_step: consumes the state.
      critic_step: likewise.
      policy_eval: what the policy's objective measures.
      rows: of an experience, for a step.
      logprobs: of policy and reference.
      values: of the critic.
      learnt: what answers teach.
    """

    policy_step: TrainStep
    critic_step: TrainStep
    policy_eval: EvalStep
    rows: Callable[[Experience, ArrayLike], Experience]
    logprobs: LogprobsStep
    values: ValuesStep
    learnt: LearntStep


def make_programs(
    recipe: PpoRecipe, policy: ShardedLlama, critic: ShardedLlama
) -> Programs:
    """The programs; the first call of each compiles it."""
    settings, objective = recipe.train, _objective(recipe)

    def make_step(
        sharded: ShardedLlama, config: OptimizerConfig, objective: Objective
    ) -> TrainStep:
        return make_train_step(
            sharded,
            make_optimizer(config, settings.num_steps),
            make_schedule(config, settings.num_steps),
            accumulate=settings.accumulate,
            spike_norm=settings.spike_norm,
            objective=objective,
        )

    values = ValueObjective(recipe.ppo.value_clip)
    return Programs(
        policy_step=make_step(policy, recipe.optimizer, objective),
        critic_step=make_step(critic, critic_optimizer_config(recipe), values),
        policy_eval=make_eval_step(policy, objective),
        rows=make_rows(policy),
        logprobs=make_logprobs(policy),
        values=make_values(critic),
        learnt=make_learnt(policy, recipe.ppo),
    )


def ppo(
    recipe: PpoRecipe,
    workdir: epath.PathLike,
    *,
    init_from: epath.PathLike | None = None,
    profile: tuple[int, int] | None = None,
    watch: Callable[[Record], None] = lambda record: None,
) -> bool:
    """Let a chat model learn from the rewards of its answers, or go on with that.

    The chat model of `init_from` is what the policy begins as, and the reference that
    it is held to; where the run is gone on with, the place that it had then will do.
    Arguments, result and errors are those of `train.pretrain.pretrain`; but the run is
    at its end, too, when held-out prompts say so, see `PpoConfig.patience`.

    Raises:
      CheckpointError: there is no model to begin with; or the run in `workdir` began
        with other models or sizes.
      DataError: the data are no prompts, or leave answers too little room.
      TokenizerError: a reward model has another tokenizer than the prompts.
    """
    with hosts_joined(recipe.train) as guard:
        return _ppo(recipe, place(workdir), init_from, profile, watch, guard)


@dataclasses.dataclass(frozen=True)
class _Run:
    """All that the loop uses, as `train.loop.Run` has it.

    Attributes:
      reader: answers prompts, and reads the answers.
      programs: the steps.
      prompts: to learn from; every host has all, as all write the answers together.
      held_out: likewise, never learnt from.
      checkpoints: where the state goes.
      sink: where the measurements go.
      guard: says when to validate, save and stop.
      profile: what to trace, and where to.
    """

    reader: Reader
    programs: Programs
    prompts: TrainingData
    held_out: Sequence[PromptBatch]
    checkpoints: RunCheckpoints
    sink: Sink
    guard: faults.Guard
    profile: tuple[tuple[int, int] | None, str]

    @property
    def recipe(self) -> PpoRecipe:
        """The recipe."""
        return self.reader.recipe


def _ppo(
    recipe: PpoRecipe,
    workdir: epath.Path,
    init_from: epath.PathLike | None,
    profile: tuple[int, int] | None,
    watch: Callable[[Record], None],
    guard: faults.Guard,
) -> bool:
    settings = recipe.train
    sets = agreed_data(STAGE, recipe, workdir=str(workdir), init_from=str(init_from))
    for prepared in sets:
        _require_room(prepared, recipe)
    policy = built(recipe)
    decoding = _decoding_mesh(recipe, policy)
    tokenizer = Tokenizer(sets[0].path / TOKENIZER)
    checkpoints = RunCheckpoints(
        workdir, keep_latest=settings.keep_latest, keep_period=settings.keep_period
    )
    with checkpoints, faults.host_loss(), faults.memory_advice(settings):
        hosts.require_agreement(checkpoints=checkpoints.steps)
        resumed = bool(checkpoints.steps)
        with hosts.failing_together():
            if resumed and not (workdir / PLAN).exists():
                raise CheckpointError(
                    f"{workdir} has checkpoints and no {PLAN}: it is a run of another "
                    "stage, or has lost that file, which says what it began with. Use "
                    "another --workdir."
                )
            keep_tokenizer(workdir, sets[0], resumed=resumed)
            beginning = began_as(workdir, init_from, recipe)
            source = open_model(beginning, recipe, sets[0])
        judge = _load_judge(recipe, policy, tokenizer)
        # As the arithmetic rounds it anyway: the same bits, before the policy learns.
        reference = source.load(policy.param_shardings, dtype=policy.model.dtype)
        plan = plan_of(recipe, reference, judge) | {"init_from": str(beginning)}
        with hosts.failing_together():
            require_plan(workdir / PLAN, plan, resumed=resumed)
        config: LlamaConfig = getattr(judge, recipe.ppo.critic).sharded.config
        critic = build_critic(config, policy)
        state, position = _restore_or(recipe, policy, critic, checkpoints, source)
        programs = make_programs(recipe, policy, critic)
        with hosts.failing_together():
            prompts = TrainingData(
                recipe.data, batch_size=recipe.ppo.prompts, position=position
            )
            held_out = ValidationData(recipe.data, batch_size=recipe.ppo.decode_batch)
            start_step = int(state.policy.step)
            sink = Sink(workdir, recipe, start_step=start_step, watch=watch)
        with sink:
            run = _Run(
                reader=Reader(
                    recipe=recipe,
                    policy=policy,
                    reference=reference,
                    judge=judge,
                    tokenizer=tokenizer,
                    decoding=decoding,
                    stop_now=guard.stop_now,
                    logprobs=programs.logprobs,
                    values=programs.values,
                    learnt=programs.learnt,
                ),
                programs=programs,
                prompts=prompts,
                held_out=[
                    batch for batch in held_out if isinstance(batch, PromptBatch)
                ],
                checkpoints=checkpoints,
                sink=sink,
                guard=guard,
                profile=(profile, str(workdir / "profile")),
            )
            return _train(run, state, position)


def _restore_or(
    recipe: PpoRecipe,
    policy: ShardedLlama,
    critic: ShardedLlama,
    checkpoints: RunCheckpoints,
    source: AnyCheckpoint,
) -> tuple[PpoState, int]:
    """Resume, else begin with chat model and reward model; and the prompts answered."""
    optimizer, critic_optimizer = (
        make_optimizer(config, recipe.train.num_steps)
        for config in (recipe.optimizer, critic_optimizer_config(recipe))
    )
    empty = PpoState(
        abstract_state(policy, optimizer),
        abstract_state(critic, critic_optimizer),
        nothing_learnt(recipe, policy),
        Best(),
    )
    restored = checkpoints.restore(
        ppo_items(empty, policy), recipe, on_damaged=recipe.train.on_damaged_checkpoint
    )
    if restored is not None:
        items, position = restored
        state = from_ppo_items(items)
        _log.info("Going on from step %d.", int(state.policy.step))
        return state, position
    rewarded = open_any(
        getattr(recipe.ppo, recipe.ppo.critic), max_length=recipe.model.max_length
    )
    params, values = (
        load_params(source, policy, recipe),
        load_params(rewarded, critic, recipe),
    )
    _log.info("Beginning with the parameters of %s.", source.directory)
    return dataclasses.replace(
        empty,
        policy=fresh_state(policy, optimizer, params),
        critic=fresh_state(critic, critic_optimizer, values),
    ), 0


def _train(run: _Run, state: PpoState, position: int) -> bool:
    """Iterations until the recipe's last step, an early stop, or until asked to stop.

    Args:
      run: the parts.
      state: where to begin; consumed.
      position: prompts that were answered before.

    Returns:
      Whether the run has reached its end.
    """
    recipe, settings, programs = run.recipe, run.recipe.train, run.programs
    clock = Stopwatch()
    first = step = int(state.policy.step)
    of_critic: list[tuple[int, Measured]] = []  # not yet written

    def flush() -> None:
        run.sink.flush()
        _write_critic(run, of_critic)

    def save() -> None:
        with clock.measure("save"):
            run.checkpoints.keep_best(int(state.best.step))
            items = ppo_items(state, run.reader.policy)
            run.checkpoints.save(step, items, position, recipe)

    def validated() -> PpoState:
        with clock.measure("validate"):
            told = held_out_pass(run.reader, state.policy.params, run.held_out)
        if told is None:
            return state
        run.sink.write(step, **told)
        reward = _counted(recipe, told["validation_reward"], told["validation_kl"])
        return dataclasses.replace(state, best=state.best.after(reward, step))

    with jax.set_mesh(run.reader.policy.mesh), profiler(*run.profile) as profile:
        is_due = step % settings.validate_every == 0 or step >= settings.num_steps
        if step > state.best.seen and is_due:
            state = validated()  # a signal came before it could be
        while step < settings.num_steps and not _is_over(recipe, state.best):
            if step % recipe.iteration_steps == 0:
                flush()
                with clock.measure("data"):
                    gathered = _gathered(run, state, position)
                if gathered is None:
                    if step not in run.checkpoints.steps:
                        save()
                    break
                experience, told = gathered
                state = dataclasses.replace(state, experience=experience)
                position += recipe.ppo.prompts
                run.sink.write(step + 1, **told)
            batch = programs.rows(state.experience, _numbers(recipe, step))
            step += 1
            profile(step)
            sums = None
            if step % recipe.iteration_steps == 0:  # most of it has been learnt
                sums = programs.policy_eval(state.policy.params, batch)
                hosts.in_turn(sums)
            with clock.compiling(step == first + 1):
                policy, measured = programs.policy_step(state.policy, batch)
                hosts.in_turn(measured)
                critic, measured_critic = programs.critic_step(state.critic, batch)
            state = dataclasses.replace(state, policy=policy, critic=critic)
            run.sink.record(step, measured)
            of_critic.append((step, measured_critic))
            decision = run.guard.decide(step, measured_critic)
            if decision.validate or decision.save or sums is not None:
                flush()  # a bad step is found before it is saved
            if sums is not None:
                report = _objective(recipe).report(jax.device_get(sums))
                run.sink.write(step, **report)
            if decision.validate:
                state = validated()
            # Where a signal ended the pass, it is made when the run goes on from here.
            stopped = decision.stop or (decision.validate and state.best.seen < step)
            if decision.save or stopped or _is_over(recipe, state.best):
                save()
            if stopped:
                break
        flush()
        run.sink.write(step, time_shares=clock.shares())
    if _is_over(recipe, state.best):
        _log.warning("Stopped early at step %d: %s.", step, state.best)
        return True
    if step >= settings.num_steps and recipe.ppo.patience is not None:
        _log.info("At the last step, %d: %s.", step, state.best)
    return int(state.best.seen) >= settings.num_steps  # its pass is made


def _gathered(
    run: _Run, state: PpoState, position: int
) -> tuple[Experience, dict[str, float]] | None:
    batch = next(run.prompts)
    assert isinstance(batch, PromptBatch)
    return gather(run.reader, state.policy.params, state.critic.params, batch, position)


def _counted(recipe: PpoRecipe, reward: float, kl: float) -> float:
    """The reward of a pass over held-out prompts; -inf beyond `PpoConfig.max_kl`."""
    max_kl = recipe.ppo.max_kl
    if max_kl is None or kl <= max_kl:
        return reward
    _log.warning(
        "Answers to held-out prompts are %.2f nats from the reference, beyond "
        "ppo.max_kl %g: with their reward of %.4f they are not the best.",
        kl,
        max_kl,
        reward,
    )
    return -math.inf


def _is_over(recipe: PpoRecipe, best: Best) -> bool:
    return recipe.ppo.patience is not None and best.num_worse >= recipe.ppo.patience


def _numbers(recipe: PpoRecipe, step: int) -> np.ndarray:
    """Of the answers of an iteration, those that the step after so many is to learn."""
    iteration, number = divmod(step, recipe.iteration_steps)
    draw = np.random.default_rng([recipe.train.seed, iteration])
    order_P = draw.permutation(recipe.ppo.prompts).astype(np.int32)
    size = recipe.train.batch_size
    return order_P[number * size : (number + 1) * size]


def _write_critic(run: _Run, measured: list[tuple[int, Measured]]) -> None:
    """Write the critic's steps, and check them as `Sink.record` does the policy's."""
    for step, read in jax.device_get(measured):
        loss, norm = float(read.loss), float(read.grad_norm)
        if read.applied:
            run.sink.write(step, value_loss=loss, value_grad_norm=norm)
            continue
        bad = (
            f"step {step} of the critic: loss {loss}, gradient norm {norm}. The update "
            "was not applied"
        )
        if run.recipe.train.on_bad_step == "stop":
            raise TrainingError(
                f"{bad} and the last checkpoint is good. Lower --ppo.critic-lr, or go "
                "on past such steps with --train.on-bad-step skip."
            )
        _log.warning("%s; going on with the next step.", bad)
    measured.clear()


def critic_optimizer_config(recipe: PpoRecipe) -> OptimizerConfig:
    """The policy's, with the critic's own learning rate if it has one."""
    peak_lr = recipe.ppo.critic_lr or recipe.optimizer.peak_lr
    return dataclasses.replace(recipe.optimizer, peak_lr=peak_lr)


def build_critic(config: LlamaConfig, policy: ShardedLlama) -> ShardedLlama:
    """A model of the sizes of the reward model it begins as, trained as the policy."""
    return build(
        config,
        policy.mesh,
        policy.rules,
        dtype=policy.model.dtype,
        remat=policy.model.remat,
        attend=policy.model.attend,
        head="scalar",
    )


def _require_room(prepared: Prepared, recipe: PpoRecipe) -> None:
    if prepared.room < recipe.ppo.max_new_tokens:
        raise DataError(
            f"{prepared.path} was prepared with max_new_tokens {prepared.room}, and "
            f"ppo.max_new_tokens is {recipe.ppo.max_new_tokens}: lower that, or "
            "prepare the prompts again."
        )


def _decoding_mesh(recipe: PpoRecipe, sharded: ShardedLlama) -> jax.sharding.Mesh:
    """The same devices: some share the weights, and groups of these the prompts."""
    mesh = decoding_mesh(
        recipe.ppo.decode_tensor,
        devices=list(sharded.mesh.devices.flat),
        slices=recipe.mesh.num_slices,
    )
    params_layout(recipe.model, mesh, decoding_rules())  # refuses what does not divide
    return mesh


def _load_judge(
    recipe: PpoRecipe, sharded: ShardedLlama, tokenizer: Tokenizer
) -> Judge:
    """Both reward models, which read what the policy writes, on its mesh."""

    def load(path: str) -> RewardModel:
        model = load_reward(path, mesh=sharded.mesh, dtype=recipe.train.compute_dtype)
        if model.tokenizer.digest != tokenizer.digest:
            raise TokenizerError(
                f"the reward model {path} has another tokenizer than the prompts, so "
                "that ids mean other text to it: train it from the chat model that is "
                "to learn."
            )
        longest = model.sharded.config.max_length
        if longest < recipe.data.sequence_length:
            raise ConfigError(
                f"the reward model {path} reads {longest} tokens, and "
                f"data.sequence_length is {recipe.data.sequence_length}: lower that."
            )
        return model

    return Judge(
        safety=load(recipe.ppo.safety),
        helpfulness=load(recipe.ppo.helpfulness),
        threshold=recipe.ppo.threshold,
    )
