"""A host as a user has it, on this machine: a network, processes, a Docker engine and a checkout of its own.

What is its own: network namespace, process namespace (killing its first process is a power cut), mount namespace with
/run and /var/lib/docker. Its engine's images stay in .cache/hosts/NAME between runs; all else is made anew.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from lab.hosts.network import Namespace, NoNamespacesError
from lab.waiting import until
from stack import images
from stack.compose import Build
from stack.shell import CACHE, ROOT

# What other engines of this machine have mounted goes first: what is mounted here as well they could not take away.
BOOT = """
set -eu
awk '$5 ~ "^/(run|var/lib/docker)/" {print $5}' /proc/self/mountinfo | tac | while read -r at; do
  umount -l "$at" 2>/dev/null || true
done
mount -t tmpfs tmpfs /run
mkdir -p /run/sshd "/run/own-$3"
mount --bind "$1/docker" /var/lib/docker
[ ! -e "$2/ssh_config" ] || mount --bind "$2/ssh_config" /etc/ssh/ssh_config
[ ! -e "$2/sshd_config" ] || /usr/sbin/sshd -f "$2/sshd_config" -E "$2/sshd.log"
exec docker-init -- dockerd --cgroup-parent="/hosts/$3" >>"$2/dockerd.log" 2>&1
"""
NEEDED = ("dockerd", "docker-init", "setpriv", "unshare", "nsenter", "git", "make")
# the replica's image as it is, where simulated ones have its name
WHOLE = "lab/whole-replica"
SSHD = Path("/usr/sbin/sshd")


class MachineError(Exception):
    """A command on a host failed, or did not end; the message has its end."""


@contextmanager
def alone() -> Iterator[None]:
    """Waits for another run here to end: the disks of the hosts are the same."""
    place = CACHE / "hosts"
    place.mkdir(parents=True, exist_ok=True)
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def check_tools() -> None:
    """A NoNamespacesError where this machine lacks what a host is made of."""
    if missing := [name for name in NEEDED if not shutil.which(name)]:
        raise NoNamespacesError(f"this needs {', '.join(missing)}")
    if os.geteuid():
        raise NoNamespacesError("hosts with engines of their own need root")


class Machine:
    """A host on the switch. It is off until `boot`."""

    def __init__(self, space: Namespace) -> None:
        self.space = space
        self.name = space.name
        self.disk = CACHE / "hosts" / self.name
        (self.disk / "docker").mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix=f"{self.name}-"))
        self.folder.chmod(0o755)
        self.checkout = self.folder / "vllm-fleet"
        self._power: subprocess.Popen[bytes] | None = None

    # ---- power

    def boot(self) -> None:
        """Switches it on. Call it in the main thread: the host ends with the thread that booted it."""
        if self.space.ended:
            self.space = Namespace(self.name, self.space.number)
        first = ["sh", "-c", BOOT, "boot", str(self.disk), str(self.folder), self.name]
        own = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "private"]
        # so that nothing of it outlives this process, however that ends
        with (self.folder / "boot.log").open("ab") as log:
            command = ["setpriv", "--pdeathsig", "KILL", *self.space.enter, *own, *first]
            self._power = subprocess.Popen(command, stdout=log, stderr=log)
        until(self._first, f"{self.name} boots")

    def wait(self) -> None:
        """Returns when its engine answers."""
        until(self.answers, f"the engine of {self.name} answers", 60)

    def power_off(self) -> None:
        """Everything on it ends at once, and no other host is told."""
        self.space.cable.cut()
        self._end()
        self.space.end()
        until(self.space.cable.gone, f"the cable of {self.name} is gone")

    def _end(self) -> None:
        assert self._power
        subprocess.run(["kill", "-9", str(self._first())], check=True)
        self._power.wait()
        self._power = None

    def remove(self) -> None:
        """Takes it away, but for its images."""
        if self._power:
            # the next run does it too
            with suppress(AssertionError, MachineError):
                self.clean()
            self._end()
        self.space.end()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _first(self) -> int:
        """Its first process; 0 where it has none yet, or still sees another engine's socket in /run."""
        assert self._power
        pid = self._power.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(children[0]) if children and Path(f"/proc/{children[0]}/root/run/own-{self.name}").exists() else 0

    # ---- commands there

    def enter(self) -> list[str]:
        """What a command begins with that is to run there."""
        first = self._first()
        assert first, f"{self.name} has not booted"
        place = self.checkout if self.checkout.exists() else self.folder
        return ["nsenter", "--target", str(first), "--net", "--mount", "--pid", "env", f"--chdir={place}"]

    def ask(self, *args: str, within_s: float = 60) -> subprocess.CompletedProcess[str]:
        """Runs a command in its checkout, and gives what came of it."""
        env = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG")}
        command = [*self.enter(), *args]
        try:
            return subprocess.run(
                command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=within_s
            )
        except subprocess.TimeoutExpired:
            raise MachineError(f"{self.name}: `{' '.join(args)}` did not end within {within_s:.0f} s") from None

    def do(self, *args: str, within_s: float = 60) -> str:
        """The same for one that must work: its output."""
        done = self.ask(*args, within_s=within_s)
        if done.returncode:
            said = (done.stdout + done.stderr).strip()[-1500:]
            raise MachineError(f"{self.name}: `{' '.join(args)}` ended with {done.returncode}: {said}")
        return done.stdout

    def make(self, target: str, args: str = "", within_s: float = 300) -> str:
        """`make TARGET ARGS='…'` in its checkout, which must work: all that it said."""
        done = self.ask("make", target, *([f"ARGS={args}"] if args else []), within_s=within_s)
        if done.returncode:
            said = (done.stdout + done.stderr).strip()[-1500:]
            raise MachineError(f"{self.name}: make {target} {args}: {said}")
        return done.stdout + done.stderr

    def answers(self) -> bool:
        """Whether its engine does."""
        return self.ask("docker", "version").returncode == 0

    # ---- containers

    def container(self, service: str) -> str:
        """The id of a service's container; '' where it has none."""
        label = f"label=com.docker.compose.service={service}"
        return self.do("docker", "ps", "--all", "--quiet", "--filter", label).strip()

    def services(self) -> list[str]:
        """The services that run."""
        return sorted(self.do("docker", "ps", "--format", '{{.Label "com.docker.compose.service"}}').split())

    def health(self, service: str) -> str:
        """What the service's own health check says."""
        found = self.container(service)
        return self.do("docker", "inspect", "--format", "{{.State.Health.Status}}", found).strip() if found else ""

    def log(self, service: str) -> str:
        """What the service's container said since it was made."""
        done = self.ask("docker", "logs", self.container(service))
        return done.stdout + done.stderr

    def kill(self, service: str) -> None:
        """SIGKILL to all of a service's container. Docker is not told, as it would leave it so."""
        pid = self.do("docker", "inspect", "--format", "{{.State.Pid}}", self.container(service)).strip()
        self.do("kill", "-9", pid)

    def clean(self) -> None:
        """Removes all containers, volumes and networks."""
        if found := self.do("docker", "ps", "--all", "--quiet").split():
            self.do("docker", "rm", "--force", "--volumes", *found, within_s=120)
        self.do("docker", "network", "prune", "--force")
        self.do("docker", "volume", "prune", "--force")
        self.do("docker", "image", "prune", "--force")

    # ---- what a user brings

    def load(self, wanted: dict[str, Build], replica: str, *, simulated: bool) -> None:
        """Makes its engine have these images of this checkout, from this machine's engine. Of a replica that is to
        be simulated any will do."""
        to_simulate = replica if simulated else ""
        label = f'{{{{index .Config.Labels "{images.RECIPE_LABEL}"}}}}'
        # a simulated one of the last time has its name
        if self.ask("docker", "tag", WHOLE, replica).returncode == 0:
            self.do("docker", "rmi", WHOLE)
        for image, build in wanted.items():
            right = images.recipe(build)
            there = self.ask("docker", "image", "inspect", "--format", label, image)
            if there.stdout.strip() == right or (image == to_simulate and there.returncode == 0):
                continue
            here = images.label_of(image, images.RECIPE_LABEL)
            if here is None or (here != right and image != to_simulate):
                raise NoNamespacesError(f"the image {image} is not here as this checkout has it: run `make up` once")
            with subprocess.Popen(["docker", "save", image], stdout=subprocess.PIPE) as saved:
                command = [*self.enter(), "docker", "load", "--quiet"]
                subprocess.run(command, stdin=saved.stdout, check=True, capture_output=True)

    def simulate(self, image: str, build: Build) -> None:
        """Makes replicas of this image simulated ones, which pass for this checkout's."""
        self.do("docker", "tag", image, WHOLE)
        made = self.do("docker", "create", image).strip()
        parts = self.folder / "sim"
        for name in ("lab", "vllm"):
            shutil.copytree(ROOT / name, parts / name)
        # else the package of that name in the image would come first
        (parts / "vllm" / "__init__.py").touch()
        self.do("docker", "cp", f"{parts}/.", f"{made}:/opt/sim")
        self.do("docker", "cp", f"{parts}/lab/sim/container.py", f"{made}:/opt/fleet/launch.py")
        labels = {images.RECIPE_LABEL: images.recipe(build), images.BASE_LABEL: images.official_base(build)}
        changes = [f"--change=LABEL {name}={value}" for name, value in labels.items()]
        self.do("docker", "commit", *changes, made, image)
        self.do("docker", "rm", made)

    def clone(self, env: dict[str, str]) -> None:
        """Makes its checkout: the files of this one, this one's packages and models, and a `.env`."""
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
        for name in filter(None, files):
            if (ROOT / name).exists():
                (self.checkout / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.checkout / name)
        (self.checkout / ".venv").symlink_to((ROOT / ".venv").resolve())
        for model in (ROOT / "models").glob("*/"):
            if model.is_dir():
                shutil.copytree(model, self.checkout / "models" / model.name, dirs_exist_ok=True)
        (self.checkout / ".env").write_text("".join(f"{name}={value}\n" for name, value in env.items()))
        (self.checkout / ".env").chmod(0o600)


def introduce(near: Machine, far: Machine) -> bool:
    """Lets root of one host sign in at another, by key, as `--ssh` needs; False where there is no sshd."""
    if not SSHD.exists():
        return False
    for place, name in ((near.folder, "id"), (far.folder, "host_key")):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(place / name)], check=True)
    shutil.copy(near.folder / "id.pub", far.folder / "authorized_keys")
    lines = ["Host *", f"IdentityFile {near.folder}/id", f"UserKnownHostsFile {near.folder}/known_hosts"]
    (near.folder / "ssh_config").write_text("\n".join([*lines, "StrictHostKeyChecking accept-new", ""]))
    server: Sequence[str] = (
        f"HostKey {far.folder}/host_key",
        f"AuthorizedKeysFile {far.folder}/authorized_keys",
        "PermitRootLogin prohibit-password",
        "PasswordAuthentication no",
        "StrictModes no",
        "UsePAM no",
        "PidFile none",
        "",
    )
    (far.folder / "sshd_config").write_text("\n".join(server))
    return True
