"""What `make up` and `make doctor` say of an autoscaler that does not fit the fleet."""

from __future__ import annotations

from typing import Any

import pytest

from stack import autoscaling
from stack.compose import Config
from stack.console import Problem


def fleet(*environments: dict[str, str]) -> Config:
    """A fleet with a replica of each environment, over the default model unless that names another."""
    services: dict[str, Any] = {
        f"vllm-{number}": {"environment": {"MODEL": "org/model"} | environment}
        for number, environment in enumerate(environments)
    }
    return Config.model_validate({"services": services, "x-pins": {}})


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"MIN_REPLICAS": "3"}, "MIN_REPLICAS asks for 3 replicas, and the fleet has 2"),
        ({"MAX_REPLICAS": "4"}, "MAX_REPLICAS asks for 4 replicas, and the fleet has 2"),
        ({"REPLICAS_TIMETABLE": "4=Mon 08:00-09:00"}, "REPLICAS_TIMETABLE asks for 4 replicas, and the fleet has 2"),
        ({"MIN_REPLICAS": "x"}, "MIN_REPLICAS=x will not do"),
    ],
)
def test_bounds_beyond_the_fleet_are_one_clear_line(values: dict[str, str], says: str) -> None:
    with pytest.raises(Problem) as problem:
        autoscaling.check(values, fleet({}, {}))
    assert says in problem.value.what
    assert problem.value.fix


def test_fleets_that_it_is_not_for_are_refused() -> None:
    with pytest.raises(Problem, match="for a fleet of one model, and this one has org/model, org/other"):
        autoscaling.check({}, fleet({}, {"MODEL": "org/other"}))
    with pytest.raises(Problem, match="SLEEP_LEVEL is set for vllm-1"):
        autoscaling.check({}, fleet({}, {"SLEEP_LEVEL": "1"}))


def test_what_fits_is_said_in_words() -> None:
    assert autoscaling.check({}, fleet({}, {}, {})) == "from 1 to 3 replicas"
    assert autoscaling.check({"MIN_REPLICAS": "2", "MAX_REPLICAS": "2"}, fleet({}, {}, {})) == "from 2 to 2 replicas"
