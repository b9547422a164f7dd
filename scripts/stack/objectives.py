"""The objectives in slo.yml: what users of the fleet may expect, for all models and for single ones."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from stack.console import Problem
from stack.shell import ROOT

FILE = ROOT / "slo.yml"


class Strict(BaseModel):
    """Takes no field that it does not know, and no value of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Objective(Strict):
    """What users of one model may expect; `availability` is a share from 0 to 1."""

    # vLLM's histograms end there.
    ttft_p95_seconds: Annotated[float, Field(gt=0, le=2560)]
    itl_p95_seconds: Annotated[float, Field(gt=0, le=80)]
    # The quick alert fires at 14.4 times the budget: with more than 5 % of it, more requests would have to fail
    # than are sent. At 1 there is no budget.
    availability: Annotated[float, Field(ge=0.95, lt=1)]


class Objectives(Strict):
    """The whole file. A model's entry has only what differs from `default`."""

    default: Objective
    models: dict[str, Objective] = {}

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: object) -> object:
        """Gives each model what it does not say itself."""
        if not isinstance(data, dict):
            return data
        default, models = data.get("default"), data.get("models")
        if not isinstance(default, dict) or not isinstance(models, dict):
            # an empty `models:` is none
            return {name: value for name, value in data.items() if name != "models" or value is not None}
        filled = {name: {**default, **own} if isinstance(own, dict) else own for name, own in models.items()}
        return {**data, "models": filled}

    def of(self, model: str) -> Objective:
        """The objective of a model, by its first name in /v1/models."""
        return self.models.get(model, self.default)


def load(path: Path = FILE) -> Objectives:
    """The objectives in a file. Whatever is wrong in it is a Problem that names the file, the line and the field."""
    try:
        text = path.read_text("utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except FileNotFoundError:
        raise Problem(f"{path.name} is missing", f"git checkout {path.name} brings it back") from None
    except UnicodeDecodeError:
        raise Problem(f"{path.name} is not UTF-8", "save the file as UTF-8") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise Problem(f"{path.name}, line {line}: {error.problem}", "correct the line") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise Problem(f"{path.name} is no YAML: {str(error).splitlines()[0]}", "correct the file") from None
    if twice := _twice(root):
        raise Problem(
            f"{path.name}, line {twice.start_mark.line + 1}: {twice.value} is there twice", "delete one of them"
        )
    try:
        return Objectives.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = [part for part in first["loc"] if part != "[key]"]
        field = ".".join(map(str, place)) or "the file"
        where = f"{path.name}, line {_line(root, place)}"
        if first["type"] == "extra_forbidden":
            known = [*Objectives.model_fields, *Objective.model_fields]
            near = difflib.get_close_matches(str(place[-1]), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise Problem(f"{where}: nothing reads {field}", hint) from None
        if first["type"] == "missing":
            raise Problem(f"{where}: {field} is missing", "add it") from None
        raise Problem(f"{where}: {field} will not do: {first['msg']}", "correct it") from None


def _pairs(node: yaml.Node | None) -> Sequence[tuple[yaml.Node, yaml.Node]]:
    return node.value if isinstance(node, yaml.MappingNode) else ()


def _twice(node: yaml.Node | None) -> yaml.Node | None:
    """A key that a mapping of the file has twice, of which YAML would drop the first."""
    seen = set()
    for key, value in _pairs(node):
        if str(key.value) in seen:
            return key
        seen.add(str(key.value))
        if found := _twice(value):
            return found
    return None


def _line(node: yaml.Node | None, place: Sequence[int | str]) -> int:
    """The line of a field, or of what stands nearest around it."""
    line = node.start_mark.line + 1 if node else 1
    for part in place:
        inside: Mapping[str, tuple[yaml.Node, yaml.Node]] = {
            str(key.value): (key, value) for key, value in _pairs(node)
        }
        if str(part) not in inside:
            break
        key, node = inside[str(part)]
        line = key.start_mark.line + 1
    return line
