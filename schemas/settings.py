"""Settings come from YAML files, then ``key=value`` overrides; they are checked once, then frozen.

OmegaConf reads and merges, pydantic checks.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf, TupleConfig
from omegaconf.errors import (
    OmegaConfBaseException,
)
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from yaml import YAMLError

from schemas.documents import verify_yaml
from schemas.errors import UserError


class Settings(BaseModel):
    """Base of every settings class: unknown keys are errors, nothing changes after validation."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _truth_is_no_number(cls, values: Any) -> Any:
        """Refuse true and false where no yes or no is asked for: pydantic would take them for 1 and 0."""
        for key, value in values.items() if isinstance(values, Mapping) else ():
            field = cls.model_fields.get(str(key))
            if isinstance(value, bool) and field is not None and bool not in _scalars(field.annotation):
                raise ValueError(f"{key}: true and false are no value of this setting")
        return values


def _scalars(annotation: Any) -> set[Any]:
    """All types in an annotation."""
    parts = get_args(annotation)
    return {annotation} if not parts else {each for part in parts for each in _scalars(part)}


Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""What random numbers are drawn with."""
Steps = Annotated[int, Field(gt=0, le=10**12)]
"""A number of steps; far more than any run makes."""


S = TypeVar("S", bound=Settings)

_NOTICES = logging.getLogger("dare.settings")


def renamed(key: str, value: object, names: Mapping[str, str]) -> object:
    """Return today's name of a setting's value that had another one in an earlier version; log so once.

    Args:
        key: dotted key of the setting, for the notice.
        value: the value that was given.
        names: former name -> today's name.
    """
    if not isinstance(value, str) or value not in names:
        return value
    _notice(f"{key}={value} is called {key}={names[value]} now; both mean the same")
    return names[value]


def without_former(section: str, values: object, key: str, why: str) -> object:
    """Return the values of a section without a key that an earlier version had; log so once.

    Args:
        section: dotted name of the section, for the notice.
        values: the section as it was given.
        key: the former key.
        why: what holds instead, for the notice.
    """
    if not isinstance(values, dict) or key not in values:
        return values
    _notice(f"{section}.{key} is no setting any more and changes nothing: {why}")
    return {name: value for name, value in values.items() if name != key}


@cache
def _notice(line: str) -> None:
    # Cached by its line, so a sweep that loads the same settings many times says it once.
    _NOTICES.warning(line)


def load_settings(
    kind: type[S],
    files: Sequence[Path | Mapping[str, Any]] = (),
    overrides: Sequence[str] = (),
    values: dict[str, Any] | None = None,
) -> S:
    """Load settings of class ``kind``: the files in order, then ``values``, then the overrides; later ones win.

    Args:
        kind: the settings class.
        files: YAML files; or settings as nested dictionaries, laid between them.
        overrides: ``key=value`` or ``section.key=value``; the value is read as YAML. ``model=NAME`` names the model.
        values: settings that come from elsewhere (command-line options), as nested dictionaries; taken as they are.

    Raises:
        UserError: a file that is missing, no YAML or unlike its checksum, an unknown key, an impossible value,
            something else in place of a section; says what is allowed.
    """
    merged: DictConfig | ListConfig | TupleConfig = OmegaConf.create({})
    where = ""
    try:
        for file in files:
            if isinstance(file, Mapping):
                merged = OmegaConf.merge(merged, _literally(file))
                continue
            where = f"{file}: "
            if not file.is_file():
                raise UserError(f"{file}: " + ("not a regular file" if file.exists() else "no such settings file"))
            # One that this program wrote carries its checksum: edited by hand or damaged on the disk, it is refused.
            verify_yaml(file, file.read_bytes())
            # Read twice: here to see what kind of thing the file is, below by OmegaConf, which knows interpolations
            # (``${...}``).
            text = file.read_text(encoding="utf-8")
            _refuse_odd_scalars(text, where)
            content = yaml.safe_load(text) or {}
            if not isinstance(content, dict):
                raise UserError(f"{file}: settings are a mapping of keys to values, this is something else")
            refuse_flat_sections(kind, content, f"{file}: ")
            part = OmegaConf.create(text)
            merged = OmegaConf.merge(merged, part)
        where = ""
        # Files, then command-line options, then overrides: each is laid over what came before, key by key.
        if values:
            merged = OmegaConf.merge(merged, _literally(values))
        for override in overrides:
            # OmegaConf would take a word without "=" for a key without a value.
            if "=" not in override.lstrip("="):
                raise UserError(f"{override!r}: an override is written key=value")
            try:
                merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([_in_full(override)]))
            except YAMLError:
                raise UserError(f"{override!r}: the value is not YAML; write text of signs in quotes") from None
        # Plain dictionaries for pydantic: interpolations are resolved, and a value that was left ``???`` is an error.
        content = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except UserError:
        raise
    except UnicodeDecodeError:
        raise UserError(f"{where}settings cannot be read: the file is not text of UTF-8") from None
    except RecursionError:
        raise UserError(f"{where}settings cannot be read: they are nested too deeply") from None
    except (OmegaConfBaseException, YAMLError, ValueError, TypeError) as error:
        # ValueError: what YAML takes for a date that there is not (2026-13-45). TypeError: OmegaConf, of a key into
        # what an earlier override has made a list.
        reason = " ".join(str(error).split()) if isinstance(error, YAMLError) else _first_line(error)
        raise UserError(f"{where}settings cannot be read: {reason}") from None
    return validated(kind, content)


def validated(kind: type[S], content: object) -> S:
    """Check what nested dictionaries say, and freeze it.

    Raises:
        UserError: an unknown key, an impossible value; it names the key and says what is allowed.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        problems = error.errors()
        # A list whose only entry is wrong is too short besides, says pydantic.
        wrong = {problem["loc"][:-1] for problem in problems}
        told = [each for each in problems if each["type"] != "too_short" or each["loc"] not in wrong]
        # Three at most: the first mistakes are often the cause of the others, and the message is to stay one line.
        raise UserError("; ".join(_explain(kind, dict(problem)) for problem in told[:3])) from None


def _first_line(error: Exception) -> str:
    """What OmegaConf says first; more lines are about its own insides."""
    said = (str(error).splitlines() or [type(error).__name__])[0].strip()
    return (
        f"{said}; ${{...}} stands for the value of another setting" if "nterpolation" in type(error).__name__ else said
    )


_ODD = re.compile("[-+]?0[0-7_]+|[-+]?0b[01_]+|[-+]?0x[0-9a-fA-F_]+|[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\\.[0-9_]*)?")
"""Texts that YAML 1.1 takes for numbers of the bases 8, 2, 16 and 60."""


def _refuse_odd_scalars(text: str, where: str) -> None:
    """Make sure that numbers in a YAML text are what they look like.

    Raises:
        UserError: one is not.
    """
    for token in yaml.scan(text):
        if isinstance(token, yaml.ScalarToken) and token.plain and _ODD.fullmatch(token.value):
            raise UserError(
                f"{where}line {token.start_mark.line + 1}: YAML takes {token.value} for a number of the base 2, 8, 16 "
                "or 60; write it in quotes, or as a decimal number"
            )


def refuse_flat_sections(kind: type[Settings], values: Mapping[str, Any], where: str) -> None:
    """Make sure that sections are mappings: what is merged later would silently take the place of anything else.

    Args:
        kind: the settings class.
        values: some of its settings, nested.
        where: what the message says before the key.

    Raises:
        UserError: names the key.
    """
    for name, field in kind.model_fields.items():
        # Only sections of one class are followed; of unions and dictionaries pydantic itself says what is wrong.
        section = field.annotation
        if name not in values or not (isinstance(section, type) and issubclass(section, Settings)):
            continue
        if not isinstance(values[name], Mapping):
            raise UserError(f"{where}{name}: a mapping of settings is wanted, not {values[name]!r}")
        refuse_flat_sections(section, values[name], f"{where}{name}.")


def _literally(value: Any) -> Any:
    """Values that OmegaConf leaves as they are: in a file's name, ``${`` is no interpolation."""
    if isinstance(value, str):
        return value.replace("${", "\\${")
    if isinstance(value, Mapping):
        return {key: _literally(each) for key, each in value.items()}
    return [_literally(each) for each in value] if isinstance(value, list | tuple) else value


def _in_full(override: str) -> str:
    """Write out ``model=twin``, which is short for ``model.name=twin``, and quote what YAML would take for a sign.

    One character that is no letter and no digit is meant as itself: a delimiter, a quote. So is what YAML 1.1 takes for
    a number of another base: ``010``, ``12:30``.
    """
    key, _, value = override.partition("=")
    if (len(value) == 1 and not value.isalnum()) or _ODD.fullmatch(value):
        return f"{key}={json.dumps(value)}"
    # ``model={name: twin}`` is a section written in YAML, and stays.
    return f"model.name={value}" if key == "model" and not value.lstrip().startswith("{") else override


def _explain(kind: type[BaseModel], problem: dict[str, Any]) -> str:
    """Say in one line which key has what problem; ``problem`` is one of pydantic's."""
    # pydantic puts the names of validators into a location ("function-before[...]"); no user has written them.
    location = [part for part in problem["loc"] if not str(part).startswith("function-")]
    key, _ = _follow(kind, location)
    if problem["type"] == "extra_forbidden":
        _, owners = _follow(kind, location[:-1])
        allowed = f"; allowed here: {', '.join(sorted(owners[0].model_fields))}" if owners else ""
        return f"{key}: unknown key{allowed}"
    if problem["type"] == "missing":
        return f"{key}: required, but not set"
    if problem["type"] == "byte_size_unit":
        problem["msg"] = "not a number of bytes with or without a unit, such as 3GiB or 500MB"
    # The texts of this package's own validators come with this prefix of pydantic's.
    message = str(problem["msg"]).removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if not key:
        return message
    given = problem.get("input")
    # A whole section would make the line unreadable, so only single values are shown.
    shown = "" if isinstance(given, dict | list | tuple) else f" (not {given!r})"
    return f"{key}: {message}{shown}"


def _follow(kind: type[BaseModel], location: Sequence[Any]) -> tuple[str, list[type[BaseModel]]]:
    """Return the dotted key of a location of pydantic, and the settings classes that can be there."""
    key, classes = [], [kind]
    for part in location:
        # After the name of a field that is a tagged union, pydantic has the member's tag, which is no part of the key.
        tagged = [member for member in classes if part in _tags(member)]
        if tagged:
            classes = tagged
            continue
        key.append(str(part))
        owner = next((member for member in classes if part in member.model_fields), None)
        if owner is not None:
            classes = _classes(owner.model_fields[part].annotation)
    return ".".join(key), classes


def _classes(annotation: Any) -> list[type[BaseModel]]:
    """Return the settings classes in a type annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [member for argument in get_args(annotation) for member in _classes(argument)]


def _tags(kind: type[BaseModel]) -> tuple[Any, ...]:
    """Return the values by which a class is chosen in a tagged union; none if it is in none."""
    field = kind.model_fields.get("kind")
    return get_args(field.annotation) if field else ()


def flat_values(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of nested dictionaries by dotted key."""
    values: dict[str, Any] = {}

    def visit(prefix: str, value: Any) -> None:
        # An empty section is kept as a value: otherwise two settings could differ without a key that says so.
        if isinstance(value, Mapping) and value:
            for key, part in value.items():
                visit(f"{prefix}.{key}" if prefix else str(key), part)
        else:
            values[prefix] = value

    visit("", content)
    return values
