"""What requests and answers of the server hold. OpenAPI is made from these classes."""

import json
from typing import Annotated, Any, Self, TypeVar

from pydantic import ConfigDict, Field, StrictInt, StrictStr, ValidationError, model_validator
from pydantic_core import ErrorDetails

from pipeline.serve.raw import said
from schemas.errors import RequestError
from schemas.settings import Settings

Columns = dict[str, Any]
"""Raw values by column of the event log: lists of equal length for what each event has, one value for what the user
has."""
UserId = StrictInt | StrictStr


class Body(Settings):
    """Base of what is sent to the server, and of what it sends."""

    # Numbers that are written as texts are no numbers.
    model_config = ConfigDict(strict=True)

    @model_validator(mode="before")
    @classmethod
    def _truth_is_no_number(cls, values: Any) -> Any:
        """Strict types refuse it anyway, and say what is wanted."""
        return values


class _OfUser(Body):
    """A request about one user's history."""

    history: Columns | None = None
    """The user's events, in any order of time: a list for each column of the event log; features of the user as one
    value."""
    user: UserId | None = None
    """In the place of a history: whose history the store has."""
    model: StrictStr | None = None
    """Name of the model that answers; none: the first one that was given."""

    @model_validator(mode="after")
    def _one_history(self) -> Self:
        if (self.history is None) == (self.user is None):
            raise ValueError("give history or user, one of them")
        return self


class ScoreRequest(_OfUser):
    """A user and what could be shown to this user."""

    candidates: list[dict[str, Any]]
    """Raw values by column: item, time, features of the impression; an item's own features may be left out."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "history": {"item": [12, 7], "time": [1700000000, 1700000600], "user": 3},
                "candidates": [{"item": 5, "time": 1700001000}],
            }
        }
    )


class Scores(Body):
    """Probabilities of each candidate, in the order of the request."""

    model: str
    """Version of the model that answered."""
    scores: list[float] | dict[str, list[float]]
    """A number a candidate; by name of the label where the model predicts several."""
    history: int
    """Behaviours of the user that were found and count; 0: anybody would get these scores."""
    unknown_items: int
    """Candidates whose item the model does not know."""


class ExplainRequest(_OfUser):
    """A user and one candidate."""

    candidate: dict[str, Any]
    """Raw values by column, like a candidate of `ScoreRequest`."""


class Retrieved(Body):
    """A behaviour that the search has found for a candidate."""

    behavior: Columns
    """Its raw values."""
    time: int
    """Seconds since 1970, UTC."""
    weight: float
    """How much attention it gets, 0 .. 1."""
    sequence: str
    """The sequence of behaviours that it was found in."""


class Explanation(Body):
    """What one model makes of a candidate."""

    name: str
    model: str
    """Version of the model."""
    scores: dict[str, float]
    """Probability by name of the label."""
    retrieved: list[Retrieved]
    """The heaviest one first."""


class Explanations(Body):
    """What each model makes of a candidate, or the one that was asked."""

    models: list[Explanation]


class AppendRequest(Body):
    """Events of one user for the store."""

    user: UserId
    events: Columns
    """A list for each column of the event log, in any order of time."""


class Appended(Body):
    """What became of events."""

    appended: int
    """Events that are new to the store."""
    known: int
    """Events that it had already."""
    not_kept: int
    """Events that are older than the last N of the user that it keeps."""


class HistoryRequest(Body):
    """Whose history the store shall show."""

    user: UserId


class History(Body):
    """The events of a user that the store keeps, in order of time."""

    history: Columns
    times: list[int]
    """Seconds since 1970, UTC, of each event."""


class TimesRequest(Body):
    """A history that did not come from the store."""

    history: Columns


class Times(Body):
    """When the events of a history were."""

    times: list[int]
    """Seconds since 1970, UTC, of each event, in the order of the request."""


class UsersRequest(Body):
    """Which users of the store to list."""

    first: UserId | None = None
    """The id to begin with, whether it is there or not; none: the store's first one."""
    count: Annotated[int, Field(ge=1, le=1000)] = 50


class Users(Body):
    """Some users of the store, in its order."""

    users: list[UserId]


class ReloadRequest(Body):
    """Which model to load."""

    name: StrictStr | None = None
    """Name of the model to replace; none: the first one that was given."""
    path: StrictStr | None = None
    """Another exported folder, below that of ``--models``; none: the folder that was given at the start, again."""


class Reloaded(Body):
    """The model that answers now."""

    name: str
    model: str
    """Version of the model."""


class Column(Body):
    """A column that a history or a candidate may have."""

    name: str
    of: str
    """What it describes: user, behavior or candidate."""
    role: str
    """What it is: user, item, timestamp, feature or filter."""
    kind: str
    """What its raw values are."""
    required: bool


class Model(Body):
    """A model that answers."""

    name: str
    model: str
    """Version of the model."""
    kind: str
    """Its class: dare, twin, ..."""
    labels: list[str]


class Health(Body):
    """Whether requests are answered, and by what."""

    status: str
    """``ready``, or ``loading`` together with 503."""
    model: str | None
    """Version of the first model."""
    models: list[Model]
    store: bool
    """Whether there is a store of histories."""


class Described(Body):
    """What the models take, for programs that make requests."""

    models: list[Model]
    columns: list[Column]
    store: bool
    max_candidates: int
    max_behaviors: int


class Failure(Body):
    """Why a request was not answered."""

    error: Annotated[str, Field(examples=["candidates: 20000 are more than the 10000 that this server takes"])]
    """One line."""


B = TypeVar("B", bound=Body)


def parsed(kind: type[B], body: bytes) -> B:
    """Read a request.

    Raises:
        RequestError: it is no JSON, has a number that is none, a key twice, an unknown one, or a value of another type.
    """
    try:
        content = json.loads(body.decode(), parse_constant=_refused, object_pairs_hook=_object)
        if not isinstance(content, dict):
            raise RequestError("the body is no JSON object")
        return kind.model_validate(content)
    except ValidationError as error:
        raise RequestError(_said(kind, error)) from None
    except UnicodeDecodeError:
        raise RequestError("the body is not text of UTF-8") from None
    except json.JSONDecodeError as error:
        said = "is empty" if not body.strip() else f"is not JSON: {error}"
        raise RequestError(f"the body {said}") from None
    except RecursionError:
        raise RequestError("the body is nested too deeply") from None
    except RequestError:
        raise
    except ValueError as error:
        # An integer of thousands of digits.
        raise RequestError(f"the body is not JSON: {error}") from None


_WANTED = {
    "dict_type": "an object",
    "list_type": "a list",
    "string_type": "text",
    "int_type": "an integer",
}
"""What pydantic's problems ask for."""


def _said(kind: type[Body], error: ValidationError) -> str:
    """Say in one line what is wrong with a request: the first three places, named as those in a history are."""
    problems: dict[str, list[ErrorDetails]] = {}
    for problem in error.errors():
        name, *inside = problem["loc"] or ("",)
        # After a name come positions, and which of several types it is that was tried.
        place = f"{name}{''.join(f'[{part}]' for part in inside if isinstance(part, int))}"
        problems.setdefault(place, []).append(problem)
    return "; ".join(_problem(kind, place, each) for place, each in list(problems.items())[:3])


def _problem(kind: type[Body], place: str, problems: list[ErrorDetails]) -> str:
    first = problems[0]
    if first["type"] == "extra_forbidden":
        return f"{said(place)}: unknown key; allowed here: {', '.join(sorted(kind.model_fields))}"
    if first["type"] == "missing":
        return f"{place}: must be given"
    if wanted := [_WANTED[each["type"]] for each in problems if each["type"] in _WANTED]:
        return f"{place}: must be {' or '.join(reversed(wanted))}, not {said(first['input'])}"
    message = str(first["msg"]).removeprefix("Value error, ")
    if not place:
        return message
    return f"{place}: {message[:1].lower()}{message[1:]}, not {said(first['input'])}"


def _object(members: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, each of whose keys must be there once: which of two was meant, nobody can know."""
    made = dict(members)
    if len(made) < len(members):
        keys = [key for key, _ in members]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise RequestError(f"the body has the key {said(twice)} twice in one object")
    return made


def _refused(name: str) -> None:
    raise RequestError(f"the body has {name}, which is no number of JSON; leave out what is missing, or write null")
