"""`llama-jax sample STEP`: a model makes data, which it or another learns from."""

import abc
import dataclasses
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TypeVar

import jax
import tyro

import llama_jax
from llama_jax.cli.progress import counting_progress
from llama_jax.config.sampling import TopP
from llama_jax.config.train import ComputeType
from llama_jax.conversion import open_checkpoint
from llama_jax.data import Prompt
from llama_jax.data.sources import dialog_files, prompt_files
from llama_jax.errors import CheckpointError, ConfigError, DataError
from llama_jax.finetune import rejection
from llama_jax.finetune.distill import (
    answer_template,
    preprompts,
    write_distilled,
)
from llama_jax.finetune.gatt import (
    Instruction,
    Resample,
    read_values,
    synthesise,
    write_ghost_rows,
)
from llama_jax.finetune.rejection import Iteration, Keep, reward_curve, write_dialogs
from llama_jax.finetune.reward import load_reward, open_reward
from llama_jax.finetune.rollout import (
    THRESHOLD,
    Judge,
    check_judge,
    load_judge,
    require_one_tokenizer,
)
from llama_jax.finetune.shards import require_counts
from llama_jax.generate import Generator, Settings
from llama_jax.generate.engine import require_slots
from llama_jax.llm import LLM
from llama_jax.model import num_params
from llama_jax.text import Tokenizer
from llama_jax.text.chat import Message
from llama_jax.train import faults
from sharding.mesh import decoding_mesh

_Item = TypeVar("_Item")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Step(abc.ABC):
    """What all steps have.

    Attributes:
      output: what to write.
      tensor: devices that share a copy of the weights; all the others have their own,
        and do as much.
      dry_run: check files and settings, say what would be done, and stop.
    """

    output: str
    tensor: int = 1
    dry_run: bool = False

    @abc.abstractmethod
    def _summary(self) -> str:
        """What would be done, with all checked that can be without any weights."""

    @abc.abstractmethod
    def _make(self) -> str:
        """Do it, and say what came of it."""

    def _mesh(self) -> jax.sharding.Mesh:
        """All devices of all hosts."""
        return decoding_mesh(self.tensor)

    def _remedies(self) -> str:
        """What to change where it does not fit into memory."""
        return f"more --tensor (now {self.tensor})"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sampling(_Step):
    """What steps have in which a model writes.

    Attributes:
      checkpoint: the newest model, of any format, or the work directory of a run.
      output: the directory to write, for this alone; what is there is not made again.
      max_new_tokens: tokens of each answer, at most.
      temperature: 1 draws from the distribution as it is.
      seed: the same seed draws the same.
      batch_size: prompts or dialogs at a time, and in a file.
      dtype: float32 or bfloat16, for all models; that of the checkpoint's files, if not
        given.
      cache_length: tokens of prompt and answer together; the context, if not given.
    """

    checkpoint: tyro.conf.Positional[str]
    max_new_tokens: int = 1024
    temperature: float = 1.0
    seed: int = 0
    batch_size: int = 32
    dtype: ComputeType | None = None
    cache_length: int | None = None

    def _remedies(self) -> str:
        return (
            f"{super()._remedies()}; a smaller --batch-size (now {self.batch_size}, "
            "each with all its answers); --dtype bfloat16 (now "
            f"{self.dtype or 'that of the files'}); a shorter --cache-length (now "
            f"{self.cache_length or 'the context'})"
        )

    def _sampler(self) -> TopP:
        """How answers are drawn."""
        return TopP(1.0, temperature=self.temperature)

    def _load(self, mesh: jax.sharding.Mesh) -> LLM:
        """The model; see `llama_jax.load` for what it raises."""
        return llama_jax.load(
            self.checkpoint,
            mesh=mesh,
            dtype=self.dtype,
            cache_length=self.cache_length,
        )

    def _writes(self) -> str:
        """Which model writes, and how, for a summary; it is checked."""
        sampler = self._sampler()
        Settings(max_new_tokens=self.max_new_tokens, sampler=sampler, seed=self.seed)
        require_counts(batch_size=self.batch_size)
        source = open_checkpoint(self.checkpoint, max_length=4096)
        require_slots(self.cache_length, source.config.max_length)
        self._tokenizer()
        return (
            f"{self.checkpoint} ({num_params(source.config):,} parameters), {sampler}, "
            f"at most {self.max_new_tokens} tokens"
        )

    def _tokenizer(self) -> Tokenizer:
        """That of the model, which has to have one."""
        source = open_checkpoint(self.checkpoint, max_length=4096)
        if source.tokenizer_path is None:
            raise CheckpointError(
                f"{self.checkpoint} has no tokenizer.model, without which it cannot "
                "answer: copy it there."
            )
        return Tokenizer(source.tokenizer_path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Judged(_Sampling):
    """What steps have in which reward models choose.

    Attributes:
      helpfulness: the work directory of the newest helpfulness reward model.
      safety: that of the safety reward model.
      threshold: probability of being safe below which that alone counts.
      num_samples: answers to choose from.
    """

    helpfulness: str
    safety: str
    threshold: float = THRESHOLD
    num_samples: int = rejection.NUM_SAMPLES
    temperature: float = rejection.SAMPLER.temperature

    def _judge(self, llm: LLM) -> Judge:
        """Both reward models, beside the model and in its type."""
        sharded = llm.engine.sharded
        return load_judge(
            safety=self.safety,
            helpfulness=self.helpfulness,
            threshold=self.threshold,
            mesh=sharded.mesh,
            dtype=str(sharded.model.dtype),
        )

    def _writes(self) -> str:
        require_counts(num_samples=self.num_samples)
        check_judge(
            safety=self.safety,
            helpfulness=self.helpfulness,
            threshold=self.threshold,
            policy=self._tokenizer(),
        )
        return f"{super()._writes()}, {self.num_samples} samples of each"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswersStep(_Judged):
    """An iteration of rejection sampling: several answers to each prompt, scored.

    A line of a file is {"messages": [... ends with the user]}, and for prompts that
    are there to elicit an unsafe answer, "about_safety": true.

    Attributes:
      prompts: .jsonl files.
    """

    prompts: tuple[str, ...]

    def _summary(self) -> str:
        prompts = _prompts(self.prompts)
        return f"{self.output}: answers to {len(prompts):,} prompts by {self._writes()}"

    def _make(self) -> str:
        prompts = _prompts(self.prompts)
        llm = self._load(self._mesh())
        with counting_progress("prompts") as watch:
            iteration = rejection.sample(
                self.output,
                Generator(llm.engine, llm.tokenizer),
                self._judge(llm),
                prompts,
                max_new_tokens=self.max_new_tokens,
                num_samples=self.num_samples,
                sampler=self._sampler(),
                seed=self.seed,
                batch_size=self.batch_size,
                watch=watch,
            )
        rewards = iteration.rewards()
        best, median = (curve[-1] for curve in reward_curve(rewards))
        return (
            f"{self.output}: {len(rewards):,} prompts, {rewards.size:,} answers; "
            f"reward {rewards.mean():.4f} on average, {best:.4f} the best of each, "
            f"{median:.4f} the median"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolStep(_Step):
    """The best answer to each prompt, of iterations of rejection sampling.

    Attributes:
      iterations: what `llama-jax sample answers` wrote, from the first to the newest.
      keep: the latest iteration's answers alone, as up to RLHF-V3, or the best of all.
      output: the .jsonl file to write, for `llama-jax data dialogs`.
      helpfulness: a reward model that scores the best answers again, where iterations
        were scored by different ones; with safety, or not at all.
      safety: likewise.
      threshold: probability of being safe below which that alone counts.
      dtype: float32 or bfloat16, for the reward models.
    """

    iterations: tyro.conf.Positional[tuple[str, ...]]
    keep: Keep
    helpfulness: str | None = None
    safety: str | None = None
    threshold: float = THRESHOLD
    dtype: ComputeType = "float32"

    def _summary(self) -> str:
        if paths := self._judges():
            helpfulness, safety = paths
            check_judge(
                safety=safety,
                helpfulness=helpfulness,
                threshold=self.threshold,
                policy=None,
            )
        if not self.iterations:
            raise DataError("there are no iterations to choose from: name one.")
        num_prompts = [
            Iteration.open(path).plan["num_prompts"] for path in self.iterations
        ]
        which = "the latest" if self.keep == "latest" else "all"
        return f"{self.output}: the best answers of {which}, to {num_prompts} prompts"

    def _make(self) -> str:
        judge = None
        if paths := self._judges():
            helpfulness, safety = paths
            judge = load_judge(
                safety=safety,
                helpfulness=helpfulness,
                threshold=self.threshold,
                mesh=self._mesh(),
                dtype=self.dtype,
            )
        winners, num_prompts = rejection.select(
            [Iteration.open(path) for path in self.iterations],
            keep=self.keep,
            judge=judge,
        )
        write_dialogs(self.output, winners)
        of_each = Counter(winner.path for winner in winners)
        parts = [f"{num:,} from {path}" for path, num in of_each.items()]
        return (
            f"{self.output}: {len(winners):,} of {num_prompts:,} prompts have an "
            f"answer: {', '.join(parts)}"
        )

    def _judges(self) -> tuple[str, str] | None:
        if self.helpfulness is None and self.safety is None:
            return None
        if self.helpfulness is None or self.safety is None:
            raise ConfigError(
                "one reward model alone does not choose: give --helpfulness and "
                "--safety, or neither."
            )
        return self.helpfulness, self.safety


@dataclasses.dataclass(frozen=True, kw_only=True)
class GhostStep(_Judged):
    """Rows of Ghost Attention: dialogs that keep an instruction to their end.

    Attributes:
      dialogs: .jsonl files of {"messages": [...]}, as `llama-jax data dialogs` reads.
      values: a JSON file of what instructions are made of, as {"figure": ["Napoleon"],
        "hobby": [...], "language": [...], "ending": {"wording": "End every answer with
        {}.", "short": "Ending: {}.", "values": [...]}}: the paper's classes by name,
        any other one with its wordings.
      resample: sample the last answer of each dialog, or all, turn by turn.
    """

    dialogs: tuple[str, ...]
    values: str
    resample: Resample = "last"

    def _summary(self) -> str:
        dialogs = _dialogs(self.dialogs)
        first, *_ = self._instructions(len(dialogs))
        return (
            f"{self.output}: {len(dialogs):,} dialogs, the first under {first.text!r}, "
            f"{self.resample} answers by {self._writes()}"
        )

    def _make(self) -> str:
        dialogs = _dialogs(self.dialogs)
        instructions = self._instructions(len(dialogs))
        llm = self._load(self._mesh())
        with counting_progress("dialogs") as watch:
            written = write_ghost_rows(
                self.output,
                llm,
                dialogs,
                instructions,
                judge=self._judge(llm),
                num_samples=self.num_samples,
                max_new_tokens=self.max_new_tokens,
                sampler=self._sampler(),
                resample=self.resample,
                seed=self.seed,
                batch_size=self.batch_size,
                watch=watch,
            )
        return f"{self.output}: {written.num_rows:,} rows of {len(dialogs):,} dialogs"

    def _instructions(self, num: int) -> list[Instruction]:
        return synthesise(random.Random(self.seed), read_values(self.values), num)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistilStep(_Sampling):
    """Rows of context distillation: answers that a safety pre-prompt made safer.

    Attributes:
      prompts: .jsonl files, as `llama-jax sample answers` reads; those with
        "about_safety": true are answered, with a pre-prompt and without, and others
        are left out. One that also has a "risk" gets the answer template of that
        category for a pre-prompt.
      safety: the work directory of the newest safety reward model.
    """

    prompts: tuple[str, ...]
    safety: str

    def _summary(self) -> str:
        adversarial, num_others = self._adversarial()
        writes = self._writes()
        _, reads = open_reward(self.safety)
        require_one_tokenizer(self._tokenizer(), reads)
        return (
            f"{self.output}: answers to {len(adversarial):,} prompts about safety, not "
            f"to {num_others:,} others, by {writes}"
        )

    def _make(self) -> str:
        adversarial, num_others = self._adversarial()
        llm = self._load(self._mesh())
        sharded = llm.engine.sharded
        safety = load_reward(
            self.safety, mesh=sharded.mesh, dtype=str(sharded.model.dtype)
        )
        with counting_progress("prompts") as watch:
            written = write_distilled(
                self.output,
                llm,
                safety,
                [prompt.messages for prompt in adversarial],
                self._preprompts(adversarial),
                max_new_tokens=self.max_new_tokens,
                sampler=self._sampler(),
                seed=self.seed,
                batch_size=self.batch_size,
                watch=watch,
            )
        return (
            f"{self.output}: {written.num_rows:,} of {len(adversarial):,} prompts "
            f"about safety have a safer answer under a pre-prompt; {num_others:,} "
            "others are left out"
        )

    def _preprompts(self, prompts: Sequence[Prompt]) -> list[str]:
        """What each is answered under: drawn, where its risk is not known."""
        drawn = preprompts(random.Random(self.seed), len(prompts))
        return [
            told if prompt.risk is None else answer_template(prompt.risk)
            for prompt, told in zip(prompts, drawn, strict=True)
        ]

    def _adversarial(self) -> tuple[list[Prompt], int]:
        """The prompts about safety, and how many others there are."""
        prompts = _prompts(self.prompts)
        adversarial = [prompt for prompt in prompts if prompt.about_safety]
        if not adversarial:
            raise DataError(
                f"none of {len(prompts)} prompts is about safety, and others are not "
                'distilled, which would make answers evasive: write "about_safety": '
                "true where it is so."
            )
        return adversarial, len(prompts) - len(adversarial)


def run(argv: Sequence[str]) -> int:
    """The command; returns the exit status."""
    step: _Step = tyro.extras.subcommand_cli_from_dict(
        {
            "answers": AnswersStep,
            "pool": PoolStep,
            "ghost": GhostStep,
            "distil": DistilStep,
        },
        prog="llama-jax sample",
        args=list(argv),
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    if step.dry_run:
        print(step._summary())
        return 0
    memory = faults.out_of_memory("what is made at a time", step._remedies())
    with faults.together(), memory:
        print(step._make())
    return 0


def _prompts(paths: Sequence[str]) -> list[Prompt]:
    return _all(prompt_files(paths), "prompts", paths)


def _dialogs(paths: Sequence[str]) -> list[Sequence[Message]]:
    dialogs = _all(dialog_files(paths), "dialogs", paths)
    return [dialog.messages for dialog in dialogs]


def _all(
    sources: Iterable[Iterable[_Item]], what: str, paths: Sequence[str]
) -> list[_Item]:
    items = [item for source in sources for item in source]
    if not items:
        raise DataError(f"there are no {what} in {', '.join(paths) or 'no file'}.")
    return items
