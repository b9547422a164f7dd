"""What `make up` and `make doctor` check of the autoscaler: its settings, and that it fits the fleet."""

from __future__ import annotations

from collections.abc import Mapping

from autoscaler import settings
from models import served
from stack.compose import Config
from stack.console import Problem


def check_settings(values: Mapping[str, str]) -> settings.Settings:
    """The autoscaler's settings, from `.env` and the environment. A Problem where one is wrong."""
    try:
        return settings.read(values)
    except settings.Mistake as mistake:
        raise Problem(mistake.what, f"in .env, {mistake.fix}") from None


def check(values: Mapping[str, str], config: Config) -> str:
    """What the autoscaler may do by these settings, in words. A Problem where one is wrong, or not for such a fleet."""
    wanted = check_settings(values)
    there = len(config.replicas)
    if len(models := served.of_fleet(config)) > 1:
        raise Problem(
            f"the autoscaler is for a fleet of one model, and this one has {', '.join(models)}",
            "take autoscaler out of COMPOSE_PROFILES",
        )
    if sleepers := [name for name in config.replicas if served.setting(config.services[name], "sleep_level")]:
        raise Problem(
            f"SLEEP_LEVEL is set for {', '.join(sleepers)}, and the autoscaler stops what nobody needs",
            "take it out of .env, or autoscaler out of COMPOSE_PROFILES",
        )
    asked = {
        "MIN_REPLICAS": wanted.least,
        "MAX_REPLICAS": wanted.most or 0,
        "REPLICAS_TIMETABLE": max((int(entry.what) for entry in wanted.entries), default=0),
    }
    for name, count in asked.items():
        if count > there:
            raise Problem(
                f"{name} asks for {count} replicas, and the fleet has {there}",
                f"add them (make up ARGS='--replicas {count}'), or lower it in .env",
            )
    return f"from {wanted.least} to {wanted.most or there} replicas"
