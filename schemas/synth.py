"""Settings of ``dare synth``: how much to generate, and the structure that is planted in it."""

from typing import Self

from pydantic import Field, NonNegativeInt, model_validator

from schemas.settings import Settings
from schemas.stream import Length

DAY = 86_400
"""Seconds."""


class SynthSettings(Settings):
    """Everything that decides what ``dare synth`` writes. With more ``events`` the first users stay as they were."""

    events: int = Field(1_000_000, gt=0, le=10**12)
    """Whole users are written until there are at least so many behaviours."""
    min_length: Length = 50
    """Behaviours of the shortest histories."""
    max_length: Length = 10_000
    """No history has more behaviours."""
    length_tail: float = Field(1.2, gt=0, le=10)
    """Index of the Pareto law of history lengths: the smaller, the more behaviours belong to a few long histories."""
    items: int = Field(100_000, ge=1, lt=2**31)
    """Memory grows by about 50 bytes for each."""
    categories: int = Field(1_000, gt=0, lt=2**31)
    item_zipf: float = Field(0.8, ge=0, le=3)
    """The popularity of an item is 1 / rank to this power; 0: all alike."""
    category_zipf: float = Field(0.8, ge=0, le=3)
    """The share of items that a category has is 1 / rank to this power; 0: all alike."""
    first_timestamp: int = Field(1_577_836_800, ge=0, lt=2**37)
    """Seconds since 1970; nothing is earlier."""
    days: int = Field(180, gt=0, le=100_000)
    """All behaviours lie within so many days."""
    loyalty: float = Field(0.8, ge=0, lt=1)
    """Chance that a behaviour stays in the category of a past one, drawn by relevance, rather than by popularity."""
    decay_days: float = Field(10.0, gt=0)
    """A past behaviour's weight falls by a factor e in so many days."""
    behavior: bool = False
    """Parquet events carry a behaviour type: pv, cart, fav or buy. (Taobao's CSV always does.)"""
    scene: bool = False
    """Parquet events and impressions carry a scene."""
    impressions_per_user: int = Field(20, gt=0, le=1_000_000)
    """Where impressions are asked for."""
    click_floor: float = Field(0.05, ge=0, le=1)
    """Chance of a click where no past behaviour is relevant."""
    click_ceiling: float = Field(0.8, ge=0, le=1)
    """Chance of a click that growing relevance tends to."""
    click_half: float = Field(0.1, gt=0)
    """Sum of relevances at which the chance of a click is halfway between floor and ceiling."""
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.min_length > self.max_length:
            raise ValueError(f"min_length {self.min_length} is above max_length {self.max_length}; raise max_length")
        if self.categories > self.items:
            raise ValueError(f"{self.categories} categories need at least as many items, there are {self.items}")
        if self.click_floor > self.click_ceiling:
            raise ValueError(f"click_floor {self.click_floor} is above click_ceiling {self.click_ceiling}")
        # Each behaviour has a second of its own. Twice as many seconds leave room for the gaps between sessions.
        if self.days * DAY < 2 * self.max_length:
            raise ValueError(
                f"max_length={self.max_length} behaviours, a second each, do not fit into days={self.days}; raise days"
            )
        return self
