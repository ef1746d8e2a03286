"""A recipe: one frozen object that says all of a run; and where recipes come from."""

import dataclasses
import difflib
import importlib.util
import inspect
import json
import math
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal, Self

from llama_jax.config.data import DataConfig
from llama_jax.config.finetune import PpoConfig, RewardConfig
from llama_jax.config.model import Head, LlamaConfig
from llama_jax.config.train import OptimizerConfig, TrainConfig, remat_pieces
from llama_jax.errors import ConfigError, LlamaError, RecipeError
from sharding import MeshConfig, ShardingError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """What the recipes of all stages have that take one step after the other.

    Attributes:
      stage: what the recipe is for, in words; the class says it.
      head: what its model ends with; likewise.
      model: the architecture.
      data: what is read.
      optimizer: AdamW and its schedule.
      train: the run.
      mesh: devices per axis.
      sequence_parallel: split the residual stream over `tensor`, see
        `sharding.training_rules`.
      topology: the slice that the mesh is made for, as "v5p:4x4x4"; "" for any.

    Raises:
      ConfigError: sequences longer than the model, a vocabulary that
        `train.loss_chunks` does not divide, or a `train.remat` of more layers.
    """

    stage: ClassVar[str]
    head: ClassVar[Head] = "unembed"

    model: LlamaConfig
    data: DataConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    mesh: MeshConfig
    sequence_parallel: bool
    topology: str

    def __post_init__(self) -> None:
        if self.data.sequence_length > self.model.max_length:
            raise ConfigError(
                f"data.sequence_length {self.data.sequence_length} exceeds "
                f"model.max_length {self.model.max_length}: shorten the one or raise "
                "the other."
            )
        if self.model.vocab_size % self.train.loss_chunks:
            fits = [n for n in range(1, 129) if self.model.vocab_size % n == 0]
            raise ConfigError(
                f"train.loss_chunks {self.train.loss_chunks} does not divide "
                f"model.vocab_size {self.model.vocab_size}: choose it from {fits}."
            )
        *first, _ = remat_pieces(self.train.remat)
        named = sum(count or 0 for _, count in first)
        if named >= self.model.num_layers:
            raise ConfigError(
                f"train.remat {self.train.remat!r} names {named} layers before its "
                f"last policy, and model.num_layers is {self.model.num_layers}: leave "
                "it at least one."
            )
        if self.topology:
            _topology_sizes(self.topology)

    @property
    def num_devices(self) -> int | None:
        """Chips of all slices; None if the recipe is for any."""
        if not self.topology:
            return None
        return math.prod(_topology_sizes(self.topology)) * self.mesh.num_slices

    def with_steps(self, num_rows: int) -> Self:
        """The recipe with its steps counted, if its first data set's rows say them."""
        del num_rows
        return self


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainRecipe(TrainingRecipe):
    """Pretraining from scratch, or going on from converted weights.

    Raises:
      ConfigError: as `TrainingRecipe`, or no steps.
    """

    stage = "pretraining"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.train.num_steps:
            raise ConfigError(
                "train.num_steps is 0: pretraining has no epochs to count them from, "
                "so give them."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpochRecipe(TrainingRecipe):
    """What the recipes of stages have that go through their data a few times.

    Attributes:
      epochs: passes over the training rows of the first data set, while rows of the
        others are drawn as `data.weights` says; `train.num_steps` is then 0, and
        becomes what they need when the data are opened. None if the steps are given.

    Raises:
      ConfigError: as `TrainingRecipe`; or neither steps nor epochs, or both.
    """

    epochs: int | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs is not None and self.epochs < 1:
            raise ConfigError(f"epochs is {self.epochs}: it has to be positive.")
        if (self.epochs is None) == (self.train.num_steps == 0):
            raise ConfigError(
                f"epochs is {self.epochs} and train.num_steps {self.train.num_steps}: "
                "give the one, and None or 0 for the other."
            )

    def with_steps(self, num_rows: int) -> Self:
        """The recipe with the steps that its epochs of so many rows need."""
        if self.epochs is None:
            return self
        first, *others = map(Fraction, self.data.weights)  # floats would round up
        rows = self.epochs * num_rows * (first + sum(others)) / first
        steps = math.ceil(rows / self.train.batch_size)
        train = dataclasses.replace(self.train, num_steps=steps)
        return dataclasses.replace(self, train=train, epochs=None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftRecipe(EpochRecipe):
    """Supervised fine-tuning on dialogs (section 3.1): a chat model of a base model.

    Dialogs that share a row see each other unless `data.segments` is set.
    """

    stage = "supervised fine-tuning"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardRecipe(EpochRecipe):
    """A reward model of a chat model, learnt from comparisons (section 3.2).

    Attributes:
      reward: the loss.

    Raises:
      ConfigError: as `EpochRecipe`; answers that would see each other; or a loss in
        chunks of a vocabulary, which a reward model does not have.
    """

    stage = "reward modelling"
    head = "scalar"

    reward: RewardConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data.segments:
            raise ConfigError(
                "data.segments is False, and answers of one row would see each other: "
                "set it."
            )
        if self.train.loss_chunks != 1:
            raise ConfigError(
                f"train.loss_chunks is {self.train.loss_chunks}, and a reward model "
                "has no logits to divide: set it to 1."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PpoRecipe(TrainingRecipe):
    """A chat model that learns from the rewards of its own answers (section 3.2.3).

    A step is one of the policy and one of the critic, on `train.batch_size` answers;
    an iteration answers `ppo.prompts` prompts, and has as many steps as they fill.
    Rows of `data.sequence_length` tokens hold one prompt with its answer.

    Attributes:
      ppo: rewards, losses and sampling.

    Raises:
      ConfigError: as `TrainingRecipe`; iterations that steps do not fill; no room for a
        prompt; or an early stop after which the best checkpoint is gone.
    """

    stage = "reinforcement learning"

    ppo: PpoConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        ppo, train = self.ppo, self.train
        if ppo.prompts % train.batch_size:
            raise ConfigError(
                f"ppo.prompts {ppo.prompts} is no multiple of train.batch_size "
                f"{train.batch_size}: all of an iteration's answers are learnt from."
            )
        if not train.num_steps or train.num_steps % self.iteration_steps:
            raise ConfigError(
                f"train.num_steps is {train.num_steps}, and an iteration has "
                f"{self.iteration_steps} steps (ppo.prompts / train.batch_size): give "
                "a multiple of that."
            )
        if ppo.max_new_tokens >= self.data.sequence_length:
            raise ConfigError(
                f"ppo.max_new_tokens {ppo.max_new_tokens} leaves no room for a prompt "
                f"in data.sequence_length {self.data.sequence_length}: lower the one "
                "or raise the other."
            )
        if self.data.segments:
            raise ConfigError(
                "data.segments is set, and a row holds a single prompt: unset it."
            )
        if ppo.patience is not None and train.validate_every % train.checkpoint_every:
            raise ConfigError(
                f"ppo.patience {ppo.patience} ends a run after its best, which no "
                f"checkpoint would have: make train.validate_every "
                f"{train.validate_every} a multiple of train.checkpoint_every "
                f"{train.checkpoint_every}."
            )

    @property
    def iteration_steps(self) -> int:
        """Steps of an iteration."""
        return self.ppo.prompts // self.train.batch_size


def _topology_sizes(topology: str) -> list[int]:
    sizes = re.fullmatch(r"v\d\w*:(\d+(?:x\d+){1,2})", topology)
    if sizes is None:
        raise ConfigError(
            f"topology is {topology!r}: write a chip and its torus, as v5p:4x4x8 or "
            "v5e:16x16."
        )
    return [int(size) for size in sizes[1].split("x")]


def paper_optimizer(*, peak_lr: float, warmup_steps: int = 2000) -> OptimizerConfig:
    """The paper's AdamW (section 2.2) with the rates that change from size to size."""
    return OptimizerConfig(
        peak_lr=peak_lr,
        final_lr_fraction=0.1,
        warmup_steps=warmup_steps,
        beta1=0.9,
        beta2=0.95,
        eps=1e-5,
        weight_decay=0.1,
        clip_norm=1.0,
    )


def paper_pretraining(
    model: LlamaConfig,
    *,
    peak_lr: float,
    topology: str,
    mesh: MeshConfig,
    rows_per_chip: float,
    remat: str,
) -> PretrainRecipe:
    """The paper's pretraining of one size: 2T tokens, in rows of the model's length.

    A step takes as many rows as the chips hold at once. The paper's takes 4M tokens
    (Table 1): on fewer chips, `--train.batch-size 1024 --train.accumulate 4` or so,
    and `--train.num-steps 476838` for as many tokens.
    What the paper leaves open is set as usual: bfloat16 arithmetic over float32
    parameters, no masks between the documents of a row.

    Args:
      model: the architecture.
      peak_lr: 3e-4 for 7B and 13B, 1.5e-4 for 34B and 70B.
      topology: one slice.
      mesh: devices per axis, of all slices.
      rows_per_chip: less than 1 where chips share a row.
      remat: what the backward pass finds saved; as much as memory holds.
    """
    chips = math.prod(_topology_sizes(topology)) * mesh.num_slices
    rows, length = round(chips * rows_per_chip), model.max_length
    return PretrainRecipe(
        model=model,
        data=DataConfig(paths=("data/pretrain",), sequence_length=length, seed=0),
        optimizer=paper_optimizer(peak_lr=peak_lr),
        train=TrainConfig(
            num_steps=math.ceil(2e12 / (rows * length)),
            batch_size=rows,
            accumulate=1,
            compute_dtype="bfloat16",
            remat=remat,
            attention="splash",
            seed=0,
            validate_every=1000,
            checkpoint_every=1000,
            keep_latest=3,
            keep_period=50_000,
            on_bad_step="stop",
        ),
        mesh=mesh,
        sequence_parallel=False,
        topology=topology,
    )


def paper_sft(
    model: LlamaConfig, *, topology: str, mesh: MeshConfig, remat: str
) -> SftRecipe:
    """The paper's supervised fine-tuning (section 3.1): two epochs, 64 rows a step.

    What the paper leaves open is ours: AdamW's constants, and the learning rate's end
    at a tenth, are those of pretraining; it warms up for 3 % of the steps; dialogs that
    share a row do not see each other.

    Args:
      model: the architecture.
      topology: one slice.
      mesh: devices per axis.
      remat: what the backward pass finds saved; as much as memory holds.
    """
    return SftRecipe(
        model=model,
        data=DataConfig(
            paths=("data/sft",),
            sequence_length=model.max_length,
            seed=0,
            segments=True,
        ),
        optimizer=dataclasses.replace(
            paper_optimizer(peak_lr=2e-5, warmup_steps=0), warmup_fraction=0.03
        ),
        train=_paper_finetuning(batch_size=64, accumulate=1, remat=remat),
        mesh=mesh,
        sequence_parallel=False,
        topology=topology,
        epochs=2,
    )


def paper_reward(
    model: LlamaConfig,
    *,
    about: Literal["helpfulness", "safety"],
    peak_lr: float,
    topology: str,
    mesh: MeshConfig,
    remat: str,
) -> RewardRecipe:
    """The paper's training of a reward model (section 3.2.2): one epoch, 512 pairs.

    All comparisons about the one quality, and others mixed in: as many for
    helpfulness, a tenth of all for safety; counted in rows, of which those of shorter
    comparisons hold more. The rate ends at a tenth of its peak, and
    grows for 3 % of the steps, or 5.

    Ours: a step takes 192 rows of 4,096 tokens, which hold about 490 pairs as long as
    the paper's (Table 6: 798 tokens an answer with its dialog); the margin is small;
    the auxiliary safety loss counts as much as the ranking, for the safety model; and
    AdamW's constants are those of pretraining.

    Args:
      model: the architecture, that of the chat model.
      about: what is rewarded.
      peak_lr: 5e-6 for 70B, 1e-5 for the others.
      topology: one slice.
      mesh: devices per axis.
      remat: what the backward pass finds saved; as much as memory holds.
    """
    return RewardRecipe(
        model=model,
        data=DataConfig(
            paths=(f"data/{about}", f"data/{about}-others"),
            weights=(1.0, 1.0) if about == "helpfulness" else (9.0, 1.0),
            sequence_length=model.max_length,
            seed=0,
            segments=True,
        ),
        optimizer=dataclasses.replace(
            paper_optimizer(peak_lr=peak_lr, warmup_steps=5), warmup_fraction=0.03
        ),
        train=_paper_finetuning(batch_size=192, accumulate=3, remat=remat),
        mesh=mesh,
        sequence_parallel=False,
        topology=topology,
        epochs=1,
        reward=RewardConfig(
            margin="small", safety_weight=1.0 if about == "safety" else 0.0
        ),
    )


def paper_ppo(
    model: LlamaConfig,
    *,
    beta: float,
    topology: str,
    mesh: MeshConfig,
    remat: str,
    decode_tensor: int,
    decode_batch: int,
) -> PpoRecipe:
    """The paper's PPO (section 3.2.3): 400 iterations of 512 prompts, 64 a step.

    AdamW with a constant rate of 1e-6, for the critic too. The paper ran 200 to 400
    iterations, and stopped by what it saw of held-out prompts: here once three looks in
    a row, ten iterations apart, have found nothing better.

    What the paper leaves open is ours: see `PpoConfig`; and prompt and answer have
    1,024 tokens each at most.

    Args:
      model: the architecture.
      beta: 0.01 for 7B and 13B, 0.005 for 34B and 70B.
      topology: one slice.
      mesh: devices per axis.
      remat: what the backward pass finds saved; as much as memory holds.
      decode_tensor: devices that share a copy of the weights for answers.
      decode_batch: prompts answered at a time, as memory allows.
    """
    train = _paper_finetuning(batch_size=64, accumulate=1, remat=remat)
    return PpoRecipe(
        model=model,
        data=DataConfig(paths=("data/prompts",), sequence_length=2048, seed=0),
        optimizer=dataclasses.replace(
            paper_optimizer(peak_lr=1e-6, warmup_steps=0), final_lr_fraction=1.0
        ),
        train=dataclasses.replace(
            train,
            num_steps=400 * 8,
            validate_every=10 * 8,
            checkpoint_every=10 * 8,
            keep_latest=2,
        ),
        mesh=mesh,
        sequence_parallel=False,
        topology=topology,
        ppo=PpoConfig(
            helpfulness="runs/helpfulness",
            safety="runs/safety",
            critic="helpfulness",
            threshold=0.15,
            beta=beta,
            prompts=512,
            max_new_tokens=1024,
            temperature=1.0,
            clip=0.2,
            value_clip=0.2,
            gamma=1.0,
            lam=0.95,
            patience=3,
            decode_tensor=decode_tensor,
            decode_batch=decode_batch,
        ),
    )


def _paper_finetuning(*, batch_size: int, accumulate: int, remat: str) -> TrainConfig:
    return TrainConfig(
        num_steps=0,
        batch_size=batch_size,
        accumulate=accumulate,
        compute_dtype="bfloat16",
        remat=remat,
        attention="splash",
        seed=0,
        validate_every=50,
        checkpoint_every=100,
        keep_latest=2,
        keep_period=0,
        on_bad_step="stop",
    )


def load_recipe(place: str) -> TrainingRecipe:
    """The recipe that `FILE.py:FUNCTION` returns.

    Raises:
      RecipeError: no such file or function, or the function returns something else.
    """
    path, _, name = place.rpartition(":")
    if not path:
        raise RecipeError(
            f"{place!r} names no recipe: write FILE.py:FUNCTION, as in "
            "configs/pretrain/llama2_7b.py:v5p_128."
        )
    module = _run_file(Path(path))
    functions = _recipe_functions(module)
    if name not in functions:
        near = difflib.get_close_matches(name, functions, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise RecipeError(
            f"{path} has no recipe {name!r}.{hint} It has {', '.join(functions)}."
        )
    recipe = _called(place, functions[name])
    if not isinstance(recipe, TrainingRecipe) or not hasattr(recipe, "stage"):
        raise RecipeError(
            f"{place} returned {type(recipe).__name__}, which is no recipe of a stage: "
            "see llama_jax/config/recipe.py."
        )
    return recipe


def recipe_names(path: Path) -> list[str]:
    """The recipes that a file offers, in the order they are written."""
    return list(_recipe_functions(_run_file(path)))


def to_json(recipe: TrainingRecipe) -> dict[str, Any]:
    """The resolved recipe and its stage, for keeping beside checkpoints."""
    return {"stage": type(recipe).stage, **dataclasses.asdict(recipe)}


def differences(saved: Mapping[str, Any], recipe: TrainingRecipe) -> dict[str, str]:
    """What a recipe changes of a saved one, as {"model.dim": "64, now 32"}."""
    before, now = _flat(saved), _flat(to_json(recipe))
    return {
        field: f"{before.get(field, 'absent')}, now {now.get(field, 'absent')}"
        for field in sorted(before.keys() | now.keys())
        if before.get(field) != now.get(field)
    }


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:  # as JSON has it: a tuple and a list are one thing
            flat[prefix + key] = json.loads(json.dumps(value))
    return flat


def _run_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise RecipeError(f"the recipe file {path} does not exist; check the path.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise RecipeError(f"{path} is not a Python file: recipes are Python functions.")
    module = importlib.util.module_from_spec(spec)
    loader = spec.loader
    _called(str(path), lambda: loader.exec_module(module))
    return module


def _called(what: str, function: Callable[[], Any]) -> Any:
    """What a user's own code gives; its mistakes are errors of the recipe."""
    try:
        return function()
    except (LlamaError, ShardingError):
        raise
    except Exception as error:
        raise RecipeError(
            f"{what} cannot be run: {type(error).__name__}: {error}."
        ) from error


def _recipe_functions(module: ModuleType) -> dict[str, Callable[[], Any]]:
    """Public functions written in this very file."""
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value)
        and value.__module__ == module.__name__
        and not name.startswith("_")
    }
