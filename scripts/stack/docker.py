"""The Docker engine and its Compose and Buildx plugins: found, installed where they are missing, started."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

from stack import checks
from stack.console import Problem
from stack.images import debian_mirror
from stack.shell import CACHE, Say, apt_install, as_root, ask, wait_for, work

PLUGINS = {"compose": checks.OLDEST_COMPOSE, "buildx": checks.OLDEST_BUILDX}
PLUGIN_FOLDER = Path("/usr/local/lib/docker/cli-plugins")
SYSTEMD = Path("/run/systemd/system")
# where there is no systemd
DOCKER_LOG = Path("/var/log/dockerd.log")
# The Debian suite whose plugins are recent; they need nothing but the C library.
PLUGIN_SUITE = "forky"


def docker_version(timeout_s: float = 60) -> tuple[checks.Version | None, str]:
    """The version of the engine that answers and '', or None and what the client says of it."""
    done = ask("docker", "version", "--format", "{{.Server.Version}}", timeout=timeout_s)
    return (checks.version(done.stdout), "") if done.returncode == 0 else (None, done.stderr)


def plugin_version(name: str) -> checks.Version | None:
    """The version of a Docker CLI plugin, or None where it is missing."""
    done = ask("docker", name, "version")
    return checks.version(done.stdout) if done.returncode == 0 else None


def check() -> str:
    """Looks at what is there without changing it, and says so; what is there but will not do is a Problem."""
    found, error = docker_version()
    if found:
        fix = "upgrade it (https://docs.docker.com/engine/install/)"
        checks.recent_enough("Docker engine", found, checks.OLDEST_DOCKER, fix)
    else:
        checks.docker_answers(error)
    words = [f"engine {checks.dotted(found)}" if found else "no engine answers yet"]
    for name, oldest in PLUGINS.items():
        if version := plugin_version(name):
            fix = f"upgrade the package docker-{name}-plugin, or delete the plugin and run `make up` again as root"
            checks.recent_enough(f"Docker's plugin {name}", version, oldest, fix)
            words.append(f"{name} {checks.dotted(version)}")
        else:
            words.append(f"no {name} yet")
    return ", ".join(words)


def gpu_toolkit() -> bool:
    """Whether Docker can give GPUs to containers: it knows NVIDIA's runtime, or finds the hook of NVIDIA's toolkit."""
    done = ask("docker", "info", "--format", "{{json .Runtimes}}")
    return (done.returncode == 0 and "nvidia" in (json.loads(done.stdout) or ())) or bool(
        shutil.which("nvidia-container-runtime-hook")
    )


def bring(say: Say) -> str:
    """Installs and starts the engine and installs its plugins, as far as they are missing; says what was done."""
    done = []
    if not docker_version()[0]:
        if ask("dockerd", "--version").returncode:
            apt_install(["docker.io", "ca-certificates"], say)
            done.append("engine installed")
        if not docker_version()[0]:
            start(say)
            done.append("engine started")
    missing = [name for name in PLUGINS if not plugin_version(name)]
    if missing:
        install_plugins(missing, say)
        done.append(" and ".join(missing) + " installed")
    return ", ".join(done) or "all there"


def start(say: Say) -> None:
    """Starts the engine, by systemd where that runs the machine, and returns when it answers: a minute at most."""
    say("starting the engine")
    if SYSTEMD.is_dir():
        see = "see `journalctl -u docker`"
        work(as_root("systemctl", "enable", "--now", "docker"), say, fix=see)
    else:
        see = f"see the end of {DOCKER_LOG}"
        # It outlives this command, and a Ctrl-C here.
        detached = f"exec setsid dockerd >{DOCKER_LOG} 2>&1 </dev/null"
        subprocess.Popen(as_root("sh", "-c", detached), start_new_session=True)

    def answers() -> bool:
        found, error = docker_version()
        if not found:
            # it may run by now, and not for this user
            checks.docker_answers(error)
        return bool(found)

    if not wait_for(answers, 60):
        raise Problem("the Docker engine does not answer a minute after its start", see)


def install_plugins(names: list[str], say: Say) -> None:
    """Installs these plugins of the Docker command, compose and buildx. A Problem where they cannot be had."""
    if "ubuntu" in Path("/etc/os-release").read_text().lower():
        apt_install([{"compose": "docker-compose-v2", "buildx": "docker-buildx"}[name] for name in names], say)
        return
    # Debian's own suites have them too old or not at all, so they are taken out of the packages of a newer one.
    mirror = debian_mirror()
    if mirror is None:
        raise Problem(
            f"Docker's {' and '.join(names)} cannot be installed: apt knows no Debian mirror here",
            "install docker-compose-plugin and docker-buildx-plugin by hand (https://docs.docker.com/engine/install/)",
        )
    apt = CACHE / "apt"
    shutil.rmtree(apt, ignore_errors=True)
    for folder in ("lists/partial", "archives/partial"):
        (apt / folder).mkdir(parents=True)
    (apt / "sources.list").write_text(f"deb {mirror} {PLUGIN_SUITE} main\n")
    options = [f"Dir::Etc::sourcelist={apt}/sources.list", "Dir::Etc::sourceparts=-", f"Dir::State::lists={apt}/lists"]
    # a mirror that lags serves a testing suite whose release file ran out
    options += [f"Dir::Cache={apt}", "APT::Sandbox::User=root", "Acquire::Check-Valid-Until=false"]
    apt_get = ["apt-get", *(f"--option={option}" for option in options)]
    fix = "check the machine's Debian mirror, or install docker-compose-plugin and docker-buildx-plugin by hand"
    work([*apt_get, "update"], say, fix=fix)
    work([*apt_get, "download", *(f"docker-{name}" for name in names)], say, fix=fix, cwd=apt)
    for package in apt.glob("*.deb"):
        work(["dpkg-deb", "--extract", str(package), str(apt / "unpacked")], say, fix=fix)
    plugins = [str(apt / "unpacked/usr/libexec/docker/cli-plugins" / f"docker-{name}") for name in names]
    work(as_root("install", "-D", "--mode=755", "--target-directory", str(PLUGIN_FOLDER), *plugins), say, fix=fix)
