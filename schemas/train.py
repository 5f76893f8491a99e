"""Settings of a training run, and which of them may change when it goes on."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, field_validator, model_validator

from schemas.model import ModelSettings
from schemas.settings import Seed, Settings, Steps, flat_values
from schemas.stream import StreamSettings

Compute = Literal["fp32", "tf32", "bf16"]


class ScheduleSettings(Settings):
    """How a learning rate changes over the steps of a run."""

    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What the learning rate does after the warm-up: stay; or fall, by a line or by half a wave of the cosine, to
    ``final_fraction`` of itself at the last step of the run."""
    warmup_steps: Annotated[int, Field(ge=0, le=10**12)] = 0
    """Number of steps over which the learning rate rises in equal steps from 0."""
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """What share of the learning rate is left at the last step, if it falls."""


class DenseSettings(ScheduleSettings):
    """How the parameters outside of the tables are trained."""

    optimizer: Literal["adam", "adamw"] = "adam"
    learning_rate: PositiveFloat = 0.01
    weight_decay: NonNegativeFloat = 1e-6
    """adam adds it to the gradient (L2 regularisation), adamw takes it from the weight (decoupled)."""
    clip_norm: PositiveFloat | None = None
    """Largest norm that the gradients of all dense parameters together may have; None: no limit."""


class ValidationSettings(Settings):
    """When the model is validated, and by which metric the best checkpoint is chosen."""

    every: Steps = 100
    """Steps between two validations; the end of each epoch is validated too."""
    metric: Literal["auc", "gauc"] = "auc"
    task: str | None = None
    """The task whose metric it is; None: the first."""
    patience: Steps | None = None
    """After how many validations in a row without a better one training ends early; None: never."""
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """About what part of the split's users a validation evaluates, always the same ones: a hash of their raw ids
    chooses them. The test, `dare evaluate` and `dare score` always take all."""


class CheckpointSettings(Settings):
    """When checkpoints are written and how many stay; the best one always does."""

    every: Steps = 500
    """Steps between two full checkpoints."""
    delta_every: Steps | None = None
    """Steps between two deltas: checkpoints that hold, of the tables, the rows that have changed since the last full
    one. Then all checkpoints that are not due by ``every`` or at the end are such. None: all are full ones."""
    keep: Annotated[int, Field(gt=0, le=1_000_000)] = 2
    """How many of the last full checkpoints stay, and how many of the deltas that stand on them, beside the best one
    and what that stands on."""

    @model_validator(mode="after")
    def _deltas_come_between(self) -> Self:
        if self.delta_every is not None and self.delta_every >= self.every:
            raise ValueError(
                f"checkpoint.delta_every: {self.delta_every} steps is not less than checkpoint.every, {self.every}, "
                "between whose checkpoints the deltas are"
            )
        return self


class ProfileSettings(Settings):
    """Which steps are profiled."""

    steps: tuple[Steps, Steps] | None = None
    """First and last of them, counted from 1: traces and a table of a step go into the run's folder ``profile``. None:
    none are. It changes no number, but the steps take longer."""

    @field_validator("steps")
    @classmethod
    def _first_comes_first(cls, steps: tuple[int, int] | None) -> tuple[int, int] | None:
        if steps is not None and steps[0] > steps[1]:
            raise ValueError("the first step must not come after the last")
        return steps


class TrainSettings(Settings):
    """All that decides what a run computes, except where its data are."""

    seed: Seed = 1
    """What the first weights and the order of the data are drawn with."""
    epochs: Annotated[int, Field(gt=0, le=1_000_000)] = 2
    deterministic: bool = False
    """Whether a step on CUDA computes the same bits each time, more slowly; on a CPU it always does."""
    compute: Compute = "fp32"
    """How a GPU multiplies matrices. tf32: all of them with 10 bits of mantissa; bf16: the hidden layers of predictions
    in bfloat16. Scores' softmax, batch normalisation, logits, losses and metrics are float32 in any case."""
    model: ModelSettings = ModelSettings()
    stream: StreamSettings = StreamSettings()
    dense: DenseSettings = DenseSettings()
    tables: ScheduleSettings = ScheduleSettings()
    """How the learning rates of all tables change; the rates themselves are those of the model's tables."""
    new_rows: Literal["initial", "category_mean"] = "initial"
    """What rows of items that are new begin with where a run begins on another one's checkpoint. initial: what weights
    are drawn as; category_mean: the mean of the rows that items of the same category had, if there are any."""
    init: dict[str, str] = Field(default_factory=dict)
    """Vectors that some tables begin with, by the table's name: a Parquet file, or the URL of one, with the
    columns raw_id and vector."""
    validation: ValidationSettings = ValidationSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    profile: ProfileSettings = ProfileSettings()
    log_every: Steps = 20
    """Steps between two points of the curves in TensorBoard, where gradients are measured too."""

    @model_validator(mode="after")
    def _validation_is_of_a_task(self) -> Self:
        names = [task.name for task in self.model.tasks]
        if self.validation.task is not None and self.validation.task not in names:
            there = ", ".join(names) or "none: name them, or leave validation.task out"
            raise ValueError(f"validation.task: {self.validation.task} is none of model.tasks; there are {there}")
        return self


MAY_CHANGE = (
    "epochs",
    "validation.every",
    "validation.patience",
    "checkpoint.every",
    "checkpoint.delta_every",
    "checkpoint.keep",
    "profile.steps",
    "log_every",
    "stream.batch_size",
    "stream.threads",
    "stream.prefetch_batches",
)
"""Settings that may differ when a run goes on. The batch size, so that other ranks can go on with global batches of the
same size. None of the others changes what a step computes, but that a learning rate that falls to the end of the run
(`ScheduleSettings.schedule`) falls to that of the present ``epochs``."""


def flat(settings: Settings) -> dict[str, Any]:
    """Return all values of settings by dotted key, defaults included."""
    return flat_values(settings.model_dump(mode="json"))


def differing(one: Settings, other: Settings) -> dict[str, tuple[Any, Any]]:
    """Return the dotted keys whose values differ, with both values; None where one of the two has no such key."""
    ours, theirs = flat(one), flat(other)
    # A dictionary as an ordered set, so that messages name keys in the order of the settings.
    keys = dict.fromkeys([*ours, *theirs])
    return {key: (ours.get(key), theirs.get(key)) for key in keys if ours.get(key) != theirs.get(key)}
