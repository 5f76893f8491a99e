"""Settings of a model: its name, features, numbers of behaviours retrieved, and tables."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self, TypeGuard

from pydantic import Field, PositiveFloat, field_serializer, field_validator, model_validator

from schemas.settings import Settings, renamed
from schemas.stream import Length

Feature = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
"""What an item, a behaviour, a user or an impression is described by, by name: ``item``, ``position`` and ``interval``,
which every data set has, and those that its manifest declares."""

TableOptimizer = Literal["rowwise_adagrad", "adagrad", "sgd", "adam", "rowwise_adam"]

Precision = Literal["fp32", "fp16"]

Communication = Literal["fp32", "fp16", "bf16"]

Memory = Literal["device", "host"]

Dim = Annotated[int, Field(ge=4, le=65_536, multiple_of=4)]
"""FBGEMM's kernels need a multiple of 4."""

Width = Annotated[int, Field(gt=0, le=1_048_576)]

SequenceName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


class Table(Settings):
    """What a table's rows are and how they learn."""

    dim: Dim = 16
    precision: Precision = "fp32"
    """fp16 needs CUDA."""
    memory: Memory = "device"
    """Where the rows are; host: a fifth of them is cached on the device, and it needs CUDA."""
    optimizer: TableOptimizer = "rowwise_adagrad"
    """adam and rowwise_adam need CUDA."""
    learning_rate: PositiveFloat = 0.2
    epsilon: PositiveFloat = 1e-8
    """Added to the denominator of the adaptive optimizers; far above a row's gradients, it holds the row still."""


class TableChange(Settings):
    """What one feature's table has of its own; None: as the set it is in."""

    dim: Dim | None = None
    precision: Precision | None = None
    memory: Memory | None = None
    optimizer: TableOptimizer | None = None
    learning_rate: PositiveFloat | None = None
    epsilon: PositiveFloat | None = None


class TableSet(Table):
    """The tables of one role, attention or representation: one for each feature."""

    features: dict[Feature, TableChange] = Field(default_factory=dict)
    """Tables that differ from the set, by feature."""

    def table(self, feature: Feature) -> Table:
        """The settings of ``feature``'s table."""
        # A feature's own values win over those of its set; what it leaves out (None) stays as in the set.
        common = self.model_dump(exclude={"features"})
        change = self.features.get(feature, TableChange()).model_dump(exclude_none=True)
        return Table(**(common | change))


class FeatureUse(Settings):
    """A feature that the model uses."""

    name: Feature
    attention: bool = True
    """Whether behaviours are scored by it, if it belongs to items or behaviours; if not, it is represented alone."""


class Task(Settings):
    """What is predicted: one of the data's labels."""

    name: Feature
    """The label."""
    weight: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """What its loss is multiplied by."""
    after: Feature | None = None
    """The task without which this one cannot happen (a purchase after a click): the head predicts it given that one,
    and learns from all targets by the product of the two (ESMM, arXiv 1804.07931)."""


class Mixture(Settings):
    """Experts that the tasks' heads share, mixed by a gate for each task (MMoE, KDD 2018)."""

    experts: Annotated[int, Field(ge=2, le=1024)] = 4
    hidden: tuple[Width, ...] = Field((200,), min_length=1, max_length=100)
    """Widths of each expert's layers."""


class ModelSettings(Settings):
    """Everything that decides what a model computes."""

    name: str = "dare"
    features: tuple[FeatureUse, ...] = Field(("item", "category", "position"), validate_default=True)
    """Features that are used, each by its name, or as ``{name: tags, attention: false}``."""
    attention: TableSet = TableSet()
    """K_A and the like. A model that shares one set of tables needs it equal to ``representation``."""
    representation: TableSet = TableSet()
    """K_R and the like."""
    context: TableSet = TableSet()
    """Tables of what belongs to users and impressions; they are seen by the prediction alone."""
    retrieved: dict[SequenceName, Length] = Field(default_factory=lambda: {"history": 20}, min_length=1)
    """K by sequence: how many behaviours of it the search keeps; where the history has fewer, the rest is padding.

    Each sequence has its own attention and pooling, and the prediction sees all of them. Their lengths N are the
    stream's.
    """
    recent: dict[SequenceName, Length] = Field(default_factory=dict)
    """How many of the latest behaviours of a sequence have an attention and a pooling of their own, beside the K
    retrieved (the short-term branch of SIM, arXiv 2006.05639, section 3.3)."""
    search: Literal["shard", "local"] = "shard"
    """Where behaviours are scored and pooled. ``shard``: where the rows are; ids travel there, the K best come back.
    ``local``: on the rank that has the sample; the rows of all behaviours travel there, as ``auxiliary_loss`` needs
    them. A model whose score is no dot product of rows searches locally either way. Before version 0.2 ``local`` was
    called ``home``, which is still read."""
    communication: Communication = "fp32"
    """How rows, pooled vectors and scores travel between ranks; ids and the weights of a pooling travel as they are.
    In 16 bits they are half as many bytes, rounded on the way; gradients of rows then travel as bf16."""
    hash_bits: Annotated[int, Field(ge=1, le=1024)] = 48
    """Random projections whose signs eta and sdim compare."""
    hash_width: Annotated[int, Field(gt=0, le=1024)] = 3
    """How many of them make up a round of sdim, in which all signs of behaviour and target must agree."""
    cluster_size: Length = 10
    """The most behaviours that twin-v2 puts into a cluster."""
    hidden: tuple[Width, ...] = Field((200, 80), min_length=1, max_length=100)
    """Widths of the prediction's hidden layers."""
    tasks: tuple[Task, ...] = ()
    """What is predicted, each by its label's name, or as ``{name: buy, after: click, weight: 0.5}``; the first is the
    main one. Empty: the data's main label."""
    mixture: Mixture | None = None
    """Experts that the tasks share; None: they share what the heads see, and nothing else."""
    auxiliary_loss: bool = False
    """Add the loss of a second prediction from attention over the whole history, not the K retrieved alone."""

    @field_validator("search", mode="before")
    @classmethod
    def _search_home_is_local(cls, value: object) -> object:
        # This runs before validation (mode="before"), which knows today's names alone.
        return renamed("model.search", value, {"home": "local"})

    @field_validator("features", "tasks", mode="before")
    @classmethod
    def _name_alone(cls, value: object) -> object:
        if isinstance(value, str):
            value = value.split(",")
        return [{"name": each} if isinstance(each, str) else each for each in value] if _is_list(value) else value

    @field_serializer("features", "tasks")
    def _shortest(self, values: tuple[FeatureUse | Task, ...]) -> list[Any]:
        # As people write them, so that settings files and comparisons of runs are easy to read.
        dumped = [value.model_dump(mode="json", exclude_defaults=True) for value in values]
        return [value["name"] if list(value) == ["name"] else value for value in dumped]

    @property
    def feature_names(self) -> tuple[Feature, ...]:
        """Names of all features that are used."""
        return tuple(feature.name for feature in self.features)

    @property
    def read_features(self) -> tuple[Feature, ...]:
        """Names of the features that batches must have: those that are used, and what sim-hard searches by."""
        return tuple({**dict.fromkeys(self.feature_names), "category": None})

    @property
    def scored_features(self) -> tuple[Feature, ...]:
        """Names of those that behaviours are scored by, if they belong to items or behaviours."""
        return tuple(feature.name for feature in self.features if feature.attention)

    @property
    def attended(self) -> dict[str, int]:
        """How many behaviours of each sequence are attended to: those retrieved, and the latest where they are too."""
        return {sequence: k + self.recent.get(sequence, 0) for sequence, k in self.retrieved.items()}

    @model_validator(mode="after")
    def _features_are_usable(self) -> Self:
        names = self.feature_names
        if "item" not in self.scored_features:
            raise ValueError("features must name item, with attention")
        if len(set(names)) < len(names):
            raise ValueError("features must name each feature once")
        for role in ("attention", "representation", "context"):
            for feature in getattr(self, role).features:
                if feature not in names:
                    raise ValueError(f"{role}.features.{feature}: features does not name {feature}")
        return self

    @model_validator(mode="after")
    def _tasks_are_usable(self) -> Self:
        names = [task.name for task in self.tasks]
        for number, task in enumerate(self.tasks):
            if task.name in names[:number]:
                raise ValueError(f"tasks: {task.name} is named twice")
            if task.after is not None and task.after not in names[:number]:
                raise ValueError(f"tasks.{number}.after: {task.after} must be a task before {task.name}")
        for sequence in self.recent:
            if sequence not in self.retrieved:
                raise ValueError(f"recent.{sequence}: retrieved does not name {sequence}")
        return self

    @model_validator(mode="after")
    def _auxiliary_loss_needs_local_search(self) -> Self:
        if self.auxiliary_loss and self.search == "shard":
            raise ValueError(
                "auxiliary_loss needs the rows of all behaviours: "
                "set model.search=local (or model.auxiliary_loss=false)"
            )
        return self


def _is_list(value: object) -> TypeGuard[Sequence[object]]:
    return isinstance(value, Sequence) and not isinstance(value, str)
