"""A Ray Serve application: vLLM's own OpenAI app in each Serve replica, their number by load, the door in front.

Settings are the replicas' own (.env.example): vllm/launch.py reads and checks them, and vLLM's parser turns the `vllm
serve` command that comes of them into the engine's arguments. Three more are Serve's: SERVE_MIN_REPLICAS,
SERVE_MAX_REPLICAS, SERVE_TARGET_REQUESTS.

    application.py            serve on the Ray node that runs here, until stopped
    application.py --print    check all settings, show what Ray Serve gets, and stop

KubeRay imports `application:build` instead.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field, PositiveInt, ValidationError

if TYPE_CHECKING:
    from vllm import launch
else:
    # it lies beside this file in the image
    import launch

NAME = "vllm"
PORT = 8000
# What a replica has as middleware, and inside Serve has not: Serve drains, and answers clients by itself.
OF_A_REPLICA = {"begin.Begin", "drain.Drain", "lines.Lines"}
# Arguments of `vllm serve` that are the server's; Ray Serve has its own, and names the model itself.
OF_THE_SERVER = {
    *("host", "port", "model", "model_tag", "served_model_name", "middleware", "shutdown_timeout"),
    *("subparser", "dispatch_function", "config", "disable_access_log_for_endpoints"),
}
# Of the environment that vllm/launch.py makes for a replica, what an engine inside Serve needs too.
OF_THE_ENGINE = ("STREAM_KEEPALIVE_SECONDS", "TORCHDYNAMO_DISABLE", "VLLM_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS")


class Scaling(BaseModel):
    """How many Serve replicas there are. Each description completes the sentence "it must be …"."""

    min_replicas: PositiveInt = Field(default=1, description="a whole number of replicas, 1 or more")
    max_replicas: PositiveInt = Field(default=2, description="a whole number of replicas, 1 or more")
    target_requests: PositiveInt = Field(default=8, description="a whole number of requests, 1 or more")


def read_scaling(environment: Mapping[str, str], mistakes: launch.Mistakes) -> Scaling:
    """The settings SERVE_*. Unknown and wrong ones are noted."""
    names = {f"SERVE_{name.upper()}": name for name in Scaling.model_fields}
    given = {name: value.strip() for name, value in environment.items() if name.startswith("SERVE_") and value.strip()}
    for name in sorted(given.keys() - names.keys()):
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
        mistakes.lines.append(f".env: unknown setting {name}; {hint}")
    try:
        scaling = Scaling.model_validate({names[name]: value for name, value in given.items() if name in names})
    except ValidationError as errors:
        for error in errors.errors():
            field = str(error["loc"][0])
            name = f"SERVE_{field.upper()}"
            description = Scaling.model_fields[field].description
            mistakes.lines.append(f".env: {name} is {given[name]!r}; it must be {description}")
        return Scaling()
    if scaling.min_replicas > scaling.max_replicas:
        mistakes.lines.append(
            f".env: SERVE_MIN_REPLICAS is {scaling.min_replicas}, more than SERVE_MAX_REPLICAS, which is "
            f"{scaling.max_replicas}; make it smaller, or the other larger"
        )
    return scaling


def engine_arguments(command: list[str]) -> dict[str, Any]:
    """What a `vllm serve` command says of the engine and its API, by vLLM's own names.

    Raises SettingsError where it says something that has no place in Ray Serve.
    """
    arguments = import_module("vllm.engine.arg_utils").AsyncEngineArgs
    cli = import_module("vllm.entrypoints.launchers.cli_args")
    parser = cli.make_arg_parser(import_module("vllm.utils.argparse_utils").FlexibleArgumentParser())
    given, defaults = vars(parser.parse_args(command[1:])), vars(parser.parse_args([]))
    set_here = {
        name: value for name, value in given.items() if value != defaults.get(name) and name not in OF_THE_SERVER
    }
    taken = {*arguments.__dataclass_fields__, *cli.FrontendArgs.__dataclass_fields__}
    if unknown := sorted(set_here.keys() - taken):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in unknown)
        raise launch.SettingsError(f"EXTRA_ARGS has {flags}, which Ray Serve does not take; leave it out")
    further = [name for name in given["middleware"] if name not in OF_A_REPLICA]
    # The outermost comes last: nothing is done for a request before it has shown its key.
    return {**set_here, "middleware": ["begin.Begin", *further, "door.Door"]}


def configuration(environment: dict[str, str]) -> dict[str, Any]:
    """What Ray's LLMConfig is made of. Raises SettingsError with a line for each mistake."""
    mistakes = launch.Mistakes()
    scaling = read_scaling(environment, mistakes)
    checked = mistakes.of(launch.check, environment, True, otherwise=None)
    if checked is None or mistakes.lines:
        raise launch.SettingsError("\n".join(mistakes.lines))
    settings, model, template = checked
    served = settings.served_model_name or [settings.model]
    if len(served) > 1:
        raise launch.SettingsError(
            f".env: SERVED_MODEL_NAME has {len(served)} names, and Ray Serve knows a model by one: leave one of them"
        )
    engine = engine_arguments(launch.serve_command(settings, model, template))
    for_engine = launch.process_environment(settings, environment, NAME)
    on_gpus = environment.get("FLEET_DEVICE") == "gpu"
    return {
        "model_loading_config": {"model_id": served[0], "model_source": model},
        "accelerator_config": {"kind": "gpu" if on_gpus else "cpu"},
        "engine_kwargs": engine,
        "deployment_config": {
            "autoscaling_config": {
                "min_replicas": scaling.min_replicas,
                "max_replicas": scaling.max_replicas,
                "target_ongoing_requests": scaling.target_requests,
            },
            # Each is asked for more than it computes at a time: what waits, waits in vLLM, by its priority.
            "max_ongoing_requests": settings.max_num_queued_reqs or 1024,
            "graceful_shutdown_timeout_s": settings.drain_seconds,
        },
        "runtime_env": {
            "env_vars": {name: for_engine[name] for name in OF_THE_ENGINE if name in for_engine}
            | {"FLEET_SERVED_MODEL": served[0]}
        },
    }


def build(_arguments: Mapping[str, str] | None = None) -> Any:
    """The application, from the environment. Raises SettingsError where a setting will not do."""
    return application_of(configuration(dict(os.environ)))


def application_of(found: dict[str, Any]) -> Any:
    """The Serve application of a configuration."""
    llm = import_module("ray.serve.llm")
    return llm.build_openai_app({"llm_configs": [llm.LLMConfig(**found)]})


def main(arguments: list[str]) -> int:
    """Serves, or returns an exit status."""
    parser = argparse.ArgumentParser(description="Serve a model by Ray Serve, from the environment.")
    parser.add_argument("--print", action="store_true", help="show what Ray Serve gets and stop")
    only_print = parser.parse_args(arguments).print
    try:
        found = configuration(dict(os.environ))
    except launch.SettingsError as error:
        for line in str(error).splitlines():
            print(f"application: {line}", file=sys.stderr)
        return 2
    if only_print:
        print(json.dumps(found, indent=1, default=str))
        return 0
    # before the application is made, which would start a cluster of its own
    import_module("ray").init(address="auto", log_to_driver=False)
    serve = import_module("ray.serve")
    serve.start(http_options={"host": "0.0.0.0", "port": PORT})
    serve.run(application_of(found), name=NAME, route_prefix="/", blocking=True)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
