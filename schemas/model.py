"""Settings of a model: its name, features, numbers of behaviours retrieved, and tables."""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, field_validator, model_validator

from schemas.settings import Settings, renamed
from schemas.stream import Length

Feature = Literal["item", "category", "position", "interval", "behavior", "scene"]
"""What a behaviour is described by; each feature has a table of its own in every set of tables."""

INHERENT: tuple[Feature, ...] = ("item", "category")
"""Features that belong to the item, whoever meets it ("inherent features", TWIN, arXiv 2302.02352, section 3.1)."""

CROSS: tuple[Feature, ...] = ("position", "interval", "behavior", "scene")
"""Features of the meeting of user and item ("user-item cross features", TWIN, section 3.1); their tables are small."""

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


class ModelSettings(Settings):
    """Everything that decides what a model computes."""

    name: str = "dare"
    features: tuple[Feature, ...] = ("item", "category", "position")
    attention: TableSet = TableSet()
    """K_A and the like. A model that shares one set of tables needs it equal to ``representation``."""
    representation: TableSet = TableSet()
    """K_R and the like."""
    retrieved: dict[SequenceName, Length] = Field(default_factory=lambda: {"history": 20}, min_length=1)
    """K by sequence: how many behaviours of it the search keeps; where the history has fewer, the rest is padding.

    Each sequence has its own attention and pooling, and the prediction sees all of them. Their lengths N are the
    stream's.
    """
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
    auxiliary_loss: bool = False
    """Add the loss of a second prediction from attention over the whole history, not the K retrieved alone."""

    @field_validator("search", mode="before")
    @classmethod
    def _search_home_is_local(cls, value: object) -> object:
        # This runs before validation (mode="before"), which knows today's names alone.
        return renamed("model.search", value, {"home": "local"})

    @model_validator(mode="after")
    def _features_are_usable(self) -> Self:
        if "item" not in self.features:
            raise ValueError("features must name item")
        if len(set(self.features)) < len(self.features):
            raise ValueError("features must name each feature once")
        for role in ("attention", "representation"):
            for feature in getattr(self, role).features:
                if feature not in self.features:
                    raise ValueError(f"{role}.features.{feature}: features does not name {feature}")
        return self

    @model_validator(mode="after")
    def _auxiliary_loss_needs_local_search(self) -> Self:
        if self.auxiliary_loss and self.search == "shard":
            raise ValueError(
                "auxiliary_loss needs the rows of all behaviours: "
                "set model.search=local (or model.auxiliary_loss=false)"
            )
        return self
