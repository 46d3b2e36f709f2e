"""The stages of a distillation, as a recipe writes them: what each trains, on what, by which losses and rates."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from .section import Section
from .text import Text

ParameterGroup = Literal[
    "decay", "feature_map", "mix", "scale", "qk_norm", "gates", "attention", "mlp", "norms", "embeddings", "lora"
]
# Of the teacher's own parameters, and of what stands for them.
OWN_GROUPS = frozenset({"attention", "mlp", "norms", "embeddings", "lora"})


def stage_keys(stages: Iterable[Stage]) -> list[str]:
    """What `--set distill.stages.KEY` calls each stage: its kind, or its number (from 0) where the kind comes again."""
    kinds = [stage.stage for stage in stages]
    return [kind if kinds.count(kind) == 1 else str(index) for index, kind in enumerate(kinds)]


def written_logits(stage: Stage) -> TeacherSpec | None:
    """The logits that a stage learns from, if it does; its text is among them."""
    return stage.teacher if isinstance(stage, DistillStage) else None


def text_of(stage: Stage, common: Text) -> Text:
    """What a stage reads: a text of its own, or the one of all stages."""
    own = None if isinstance(stage, CalibrateStage) else stage.text
    return own or common


def stage_title(kind: str, key: str) -> str:
    """A stage's name in messages: its kind, with the number where the kind comes again."""
    return kind if key == kind else f"{kind} {key}"


class CalibrateStage(Section):
    """Closed-form start values from the teacher.

    `decay` sets the slopes from its attention distance: the half-life of a state is `stretch` times the mean distance.
    `norms` sets the gains of a q/k norm (where the recipe has one) so that the mean norms of its queries and keys are
    kept, `output` scale and mix by least squares.
    """

    stage: Literal["calibrate"]
    tokens: int = Field(4096, gt=0)
    length: int = Field(512, gt=1)
    decay: bool = True
    stretch: float = Field(1.0, gt=0)
    norms: bool = True
    output: bool = True

    @property
    def spent(self) -> int:
        """Tokens that it reads."""
        return self.tokens


class LoraSpec(Section):
    """Low-rank adapters W + (alpha / rank) B A of frozen matrices (LoRA, arXiv 2106.09685), merged at the stage's end.

    `targets` are endings of module names, as in peft; null takes every matrix of the attention modules that were
    swapped, also fused ones. Rank and alpha start as in LoLCATs, arXiv 2410.10254.
    """

    rank: int = Field(8, gt=0)
    alpha: float = Field(16.0, gt=0)
    targets: tuple[str, ...] | None = Field(None, min_length=1)


class TrainStage(Section):
    """What every trained stage says about data, optimiser and precision.

    `tokens` is the budget, `batch` the number of sequences of `length` tokens per optimiser step, `micro_batch`
    per forward pass. `learning_rate` is that of the new parameters, `backbone_learning_rate` that of the
    teacher's own weights among the trainable ones, or of their adapters; `learning_rates` overrides both for groups
    of parameters (`optimizer.grouping`), and 0 leaves a group out. After a warm-up the `scheduler` takes all of them
    to `final_learning_rate`. `compile` runs the decoder layers through torch.compile (in align only the swaps; not a
    teacher that is the student's own weights). `cuda_graph` records the kernels of a micro-batch once and replays them,
    on one GPU, without `gradient_checkpointing` and `document_mask`; elsewhere it changes nothing. With
    `document_mask` no document in a window is seen from the next one, by student or teacher: attention, states and
    positions start anew (arXiv 2402.13991, intra-document masking); without it documents run on.
    """

    tokens: int = Field(gt=0)
    length: int = Field(512, gt=1)
    batch: int = Field(32, gt=0)
    micro_batch: int | None = Field(None, gt=0)
    learning_rate: float = Field(gt=0)
    backbone_learning_rate: float = Field(0.0, ge=0)
    learning_rates: dict[ParameterGroup, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    train: Literal["new", "attention", "all", "lora"] = "new"
    lora: LoraSpec = LoraSpec()
    scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(0.05, ge=0, lt=1)
    final_learning_rate: float = Field(0.1, ge=0, le=1, description="last learning rate as a share of the first")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    gradient_checkpointing: bool = False
    compile: bool = False
    cuda_graph: bool = True
    document_mask: bool = False
    text: Text | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.batch % (self.micro_batch or self.batch):
            raise ValueError(f"micro_batch {self.micro_batch} does not divide batch {self.batch}")
        own = [rate for group, rate in self.learning_rates.items() if group in OWN_GROUPS]
        if self.train == "lora" and dict(self.learning_rates).get("lora") == 0:
            raise ValueError("train: lora with learning_rates.lora 0 trains no adapter: say train: new")
        if self.train != "new" and not max(self.backbone_learning_rate, *own, 0.0):
            raise ValueError(f"train: {self.train} needs a backbone_learning_rate above 0")
        if self.train != "lora" and self.lora != LoraSpec():
            raise ValueError(f"lora goes with train: lora, not with train: {self.train}")
        if self.compile and self.gradient_checkpointing:
            raise ValueError("compile does not go with gradient_checkpointing: leave one of them out")
        if self.tokens < self.batch * self.length:
            raise ValueError(f"tokens {self.tokens} is less than one step of {self.batch} x {self.length}")
        return self

    @property
    def steps(self) -> int:
        """Optimiser steps that the token budget pays for."""
        return self.tokens // (self.batch * self.length)

    @property
    def spent(self) -> int:
        """Tokens of these steps."""
        return self.steps * self.batch * self.length


class AlignStage(TrainStage):
    """Each swapped layer learns its teacher layer's attention output on the teacher's own inputs.

    It trains the new parameters only, for its teacher is the model's own softmax.
    """

    stage: Literal["align"]

    @model_validator(mode="after")
    def _new_parameters_only(self) -> Self:
        if self.train != "new":
            raise ValueError("align trains the new parameters only (train: new)")
        return self


class LossSpec(Section):
    """Weights of the losses on logits; `beta` is that of the generalised Jensen-Shannon divergence `jsd`."""

    forward_kl: float = Field(0.0, ge=0)
    reverse_kl: float = Field(0.0, ge=0)
    jsd: float = Field(0.0, ge=0)
    cross_entropy: float = Field(0.0, ge=0)
    beta: float = Field(0.5, gt=0, lt=1)

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.forward_kl + self.reverse_kl + self.jsd + self.cross_entropy:
            raise ValueError("give a weight to at least one of forward_kl, reverse_kl, jsd, cross_entropy")
        return self


class TeacherSpec(Section):
    """A teacher that need not be there: the folder that `swapattn logits` writes and the stage reads."""

    logits: str


class DistillStage(TrainStage):
    """The whole model learns the teacher's next-token distribution over the full vocabulary, or the text itself.

    `losses` are weights, of which those left out are 0; without it the loss is the forward KL. `chunk` is how many
    tokens' logits exist at a time; null chooses as many as 512 MiB hold (on a CPU 64 MiB). `teacher` is null for the
    model that the checkpoint was made from. `branch` `local` trains the window-only control: swapped layers are their
    softmax window alone while the stage runs, and only the teacher's own parameters are trained.
    """

    stage: Literal["distill"]
    losses: LossSpec = LossSpec(forward_kl=1.0)
    temperature: float = Field(1.0, gt=0)
    chunk: int | None = Field(None, gt=0)
    teacher: TeacherSpec | None = None
    branch: Literal["both", "local"] = "both"

    @model_validator(mode="after")
    def _written_logits_are_what_they_are(self) -> Self:
        if self.teacher is not None and self.temperature != 1:
            raise ValueError("temperature is 1 with teacher.logits: what was written cannot be tempered any more")
        if self.teacher is not None and not self.needs_teacher:
            raise ValueError("teacher.logits is of no use to a loss without a divergence")
        if self.branch == "local" and self.train == "new":
            raise ValueError("branch: local leaves the new parameters out, so train must be attention, all or lora")
        return self

    @property
    def needs_teacher(self) -> bool:
        """Whether any loss compares the student with a teacher."""
        return self.losses.forward_kl + self.losses.reverse_kl + self.losses.jsd > 0

    @property
    def runs_teacher(self) -> bool:
        """Whether a teacher has to be run for that."""
        return self.needs_teacher and self.teacher is None


class ExtendStage(DistillStage):
    """A distill stage with other defaults, for longer contexts: whole documents, the text itself beside the teacher.

    Length and rates as in the last stages of HALO (arXiv 2601.22156) and RADLADS (arXiv 2505.03005), which take the
    cross-entropy alone; a tenth of KL as in arXiv 2603.15590.
    """

    stage: Literal["extend"]  # type: ignore[assignment]
    length: int = Field(4096, gt=1)
    batch: int = Field(8, gt=0)
    learning_rate: float = Field(1e-5, gt=0)
    backbone_learning_rate: float = Field(1e-5, ge=0)
    train: Literal["new", "attention", "all", "lora"] = "all"
    document_mask: bool = True
    losses: LossSpec = LossSpec(cross_entropy=0.9, forward_kl=0.1)


Stage = Annotated[CalibrateStage | AlignStage | DistillStage | ExtendStage, Field(discriminator="stage")]
