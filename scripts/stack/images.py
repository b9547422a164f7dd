"""The stack's images: over official ones where a registry answers, else over ones built from packages."""

from __future__ import annotations

import hashlib
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stack.checks import dotted, version
from stack.compose import Build, Config
from stack.console import Problem, console
from stack.shell import CACHE, LOG, ROOT, Say, apt_install, as_root, ask, work

Mode = Literal["auto", "registry", "packages"]

WHEELS = CACHE / "wheels"
WHEEL_LIST = ROOT / "images" / "replica" / "requirements.txt"
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# They say of an image that was built here, or where a bundle was packed, over what and of what.
BASE_LABEL = "vllm-fleet.base"
RECIPE_LABEL = "vllm-fleet.recipe"
REPLICA_DOCKERFILE = ROOT / "images" / "replica" / "Dockerfile"
# A registry that has not begun to answer by then is taken to be out of reach.
REGISTRY_SECONDS = 20


@dataclass(frozen=True)
class DebianBase:
    """A base image of Debian's packages alone, laid out as the official image that it stands in for."""

    name: str
    suite: str
    packages: tuple[str, ...]
    # shell lines that finish the file system, which is "$1"
    finish: tuple[str, ...] = ()

    @property
    def tag(self) -> str:
        """The image's name; another recipe has another tag."""
        return f"vllm-fleet/base-{self.name}:{digest(repr(self))}"


# forky has the Nginx, Prometheus and node exporter that docker-compose.yml pins; bookworm has the Python that the
# wheels are for.
GATEWAY = DebianBase(
    "gateway",
    "forky",
    ("nginx", "libnginx-mod-http-js", "libnginx-mod-stream", "curl", "ca-certificates"),
    (
        'echo nginx:x:101: >>"$1/etc/group"',
        'echo nginx:x:101:101:nginx:/nonexistent:/bin/false >>"$1/etc/passwd"',
        'ln -sf /dev/stdout "$1/var/log/nginx/access.log"',
        'ln -sf /dev/stderr "$1/var/log/nginx/error.log"',
    ),
)
PROMETHEUS = DebianBase("prometheus", "forky", ("prometheus", "promtool", "ca-certificates"))
NODE_EXPORTER = DebianBase(
    "node-exporter",
    "forky",
    ("prometheus-node-exporter", "wget"),
    ('ln -s prometheus-node-exporter "$1/usr/bin/node_exporter"',),
)
ALERTMANAGER = DebianBase(
    "alertmanager",
    "forky",
    ("prometheus-alertmanager", "ca-certificates"),
    # as the official image calls it
    ('ln -s prometheus-alertmanager "$1/usr/bin/alertmanager"',),
)
PYTHON = DebianBase(
    "python",
    "bookworm",
    # libpython3.11 is for Triton, which runs its backends in it
    (
        "python3",
        "python3-venv",
        "libpython3.11",
        "libgomp1",
        "libnuma1",
        "libtcmalloc-minimal4",
        "curl",
        "ca-certificates",
    ),
)
# numpy, of the store of traces, needs libstdc++
TOKENS = DebianBase("tokens", "bookworm", ("python3", "python3-venv", "ca-certificates", "libstdc++6"))
PYTHON_OF_THE_WHEELS = "3.11"

ACME = DebianBase("acme", "forky", ("lego", "ca-certificates"))

STAND_INS: Mapping[str, DebianBase] = {
    "docker.io/library/nginx": GATEWAY,
    "docker.io/prom/node-exporter": NODE_EXPORTER,
    "docker.io/prom/prometheus": PROMETHEUS,
    "docker.io/prom/alertmanager": ALERTMANAGER,
    "docker.io/library/python": TOKENS,
    "ghcr.io/open-webui/open-webui": TOKENS,
    "docker.io/vllm/vllm-openai-cpu": PYTHON,
    "docker.io/goacme/lego": ACME,
}


def digest(*parts: str) -> str:
    """A short name for these texts together."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def image_id(image: str) -> str:
    """What identifies the image's content; '' where this machine does not have it."""
    return ask("docker", "image", "inspect", "--format", "{{.Id}}", image).stdout.strip()


def present(image: str) -> bool:
    """Whether this machine has the image."""
    return bool(image_id(image))


def pull(image: str, say: Say) -> bool:
    """Fetches an image; False where no registry gives it."""
    try:
        work(["docker", "pull", image], say, fix="", first_line_within=REGISTRY_SECONDS)
    except Problem:
        return False
    return True


def label_of(image: str, label: str) -> str | None:
    """A label of an image; '' where it has none, as one that came from elsewhere, None where the image is missing."""
    found = ask("docker", "image", "inspect", "--format", f'{{{{index .Config.Labels "{label}"}}}}', image)
    return found.stdout.strip().replace("<no value>", "") if found.returncode == 0 else None


def recipe(build: Build) -> str:
    """A short name for what goes into an image over its base. The other files beside are mounted over those in it."""
    files = [build.context / "Dockerfile", *sorted(build.context.glob("*.py"))]
    return digest(repr(sorted(build.args.items())), *(part for file in files for part in (file.name, file.read_text())))


def official_base(build: Build) -> str:
    """The official image that an image's Dockerfile is meant for."""
    return build.args["GPU_BASE" if build.args.get("DEVICE") == "gpu" else "BASE"]


def kind(build: Build) -> Literal["cpu", "gpu", "traces", "webui", "rest"]:
    """Whether an image is a replica's, for a CPU or for GPUs, or the store of traces, Open WebUI, or one of
    the rest."""
    match build.context.name:
        case "traces" | "webui" as own:
            return own
    if "GPU_BASE" not in build.args:
        return "rest"
    return "gpu" if build.args.get("DEVICE") == "gpu" else "cpu"


def stand_in_for(official: str) -> DebianBase | None:
    """What is built from packages instead of an official image; None where nothing is."""
    return STAND_INS.get(official.rsplit(":", 1)[0])


def may_stay(base: str, build: Build, mode: Mode) -> bool:
    """Whether an image over this base is what the pins, the recipes and the switch IMAGES ask for now."""
    official = official_base(build)
    stand_in = stand_in_for(official)
    return (base == official and (mode != "packages" or stand_in is None)) or (
        stand_in is not None and base == final_tag(stand_in) and mode != "registry"
    )


def without_base(config: Config, mode: Mode) -> dict[str, Build]:
    """What is to be built, and over a base that has to be brought first: what is missing or out of date."""

    def is_right(image: str, build: Build) -> bool:
        base = label_of(image, BASE_LABEL)
        if not base:
            return base is not None
        # Without its base (pruned, or left out of a bundle) an image will do while it is of this checkout.
        return may_stay(base, build, mode) and (present(base) or label_of(image, RECIPE_LABEL) == recipe(build))

    return {image: build for image, build in builds_of(config).items() if not is_right(image, build)}


def builds_of(config: Config) -> dict[str, Build]:
    """How each image is built that is built over a base, by its name."""
    return {service.image: build for service in config.services.values() if (build := service.over_a_base)}


def bring(config: Config, mode: Mode, say: Say) -> str:
    """Makes every image of the stack be there and up to date, except those that only a registry has and none gives.

    Returns what was done, in words. Raises a Problem where an image that the stack cannot do without is not to be had.
    """
    builds = builds_of(config)
    homeless = without_base(config, mode)
    bases = {image: base for image in builds.keys() - homeless.keys() if (base := label_of(image, BASE_LABEL))}
    bases = {image: base for image, base in bases.items() if present(base)}
    try:
        chosen, registry_answers = choose_bases(homeless, mode, say)
    except Problem as problem:
        if old := [image for image in homeless if present(image)]:
            what = f"{', '.join(old)}: out of date, and cannot be built anew"
            raise Problem(f"{what}: {problem.what}", problem.fix) from None
        raise
    for image, base in chosen.items():
        if difference := other_version(official_base(builds[image]), base):
            console.print(f"[yellow]{image}: {difference}[/]", soft_wrap=True)
    changed = [image for image, base in (bases | chosen).items() if build_over(base, image, builds[image], say)]
    for image in {service.image for service in config.services.values() if not service.build}:
        if registry_answers and not present(image):
            pull(image, say)
    return ", ".join(f"{image} built over {(bases | chosen)[image]}" for image in changed) or "all there"


def other_version(official: str, base: str) -> str:
    """In words, how the version in a base of Debian's packages differs from the pinned one; '' where it does not."""
    stand_in = stand_in_for(official)
    # the packages over Debian's Python are pinned themselves
    if stand_in in (None, PYTHON, TOKENS) or base != stand_in.tag:
        return ""
    package, pinned = stand_in.packages[0], version(official.rsplit(":", 1)[1])
    query = ["dpkg-query", "--show", "--showformat=${Version}", package]
    found = version(ask("docker", "run", "--rm", "--network=none", f"--entrypoint={query[0]}", base, *query[1:]).stdout)
    if found is None or pinned is None or found == pinned:
        return ""
    return f"Debian has {package} {dotted(found)} today, not {dotted(pinned)} as docker-compose.yml pins"


def build_over(base: str, image: str, build: Build, say: Say) -> bool:
    """Builds an image over a base; says whether it changed. What is built already comes from BuildKit's cache."""
    before = image_id(image)
    if stand_in_for(official_base(build)) is TOKENS:
        lay_wheels(build, base == TOKENS.tag, say)
    # not `docker build`, which is BuildKit only in newer clients
    command = ["docker", "buildx", "build", "--load", "--progress=plain", f"--label={BASE_LABEL}={base}"]
    command += [f"--label={RECIPE_LABEL}={recipe(build)}"]
    command += [f"--build-arg={name}={value}" for name, value in {**build.args, "BASE": base}.items()]
    work([*command, f"--tag={image}", str(build.context)], say, fix="see what the build says")
    return image_id(image) != before


def choose_bases(builds: Mapping[str, Build], mode: Mode, say: Say) -> tuple[dict[str, str], bool]:
    """Brings a base for each image to be built, and gives them by image, and whether a registry may answer."""
    registry_answers = mode != "packages"
    bases: dict[str, str] = {}
    stand_ins: dict[str, DebianBase] = {}
    for image, build in builds.items():
        official = official_base(build)
        stand_in = stand_in_for(official)
        if mode == "packages" and stand_in:
            stand_ins[image] = stand_in
        elif present(official) or (registry_answers and pull(official, say)):
            bases[image] = official
        elif mode == "auto" and stand_in:
            registry_answers = False
            stand_ins[image] = stand_in
        else:
            other_way = "set IMAGES=auto" if stand_in else "set GPU=off"
            raise Problem(
                f"{official} is not on this machine, and no registry gives it",
                f"`docker load` it here, make its registry reachable, or {other_way}",
            )
    return bases | build_stand_ins(stand_ins, say), registry_answers


def build_stand_ins(stand_ins: Mapping[str, DebianBase], say: Say) -> dict[str, str]:
    """Builds base images from packages, side by side; gives their tags by the images that are built over them."""
    if stand_ins and platform.machine() != "x86_64":
        what = f"images cannot be built from packages on {platform.machine()}, only on x86_64"
        raise Problem(what, "make the images' registry reachable, or `docker load` them here")
    missing = [base for base in stand_ins.values() if not present(base.tag)]
    if missing and ask("mmdebstrap", "--version").returncode:
        apt_install(["mmdebstrap", "debian-archive-keyring"], say)
    replica = PYTHON in stand_ins.values()
    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(build_debian, base, say) for base in missing]
        if replica:
            jobs.append(pool.submit(gather_wheels, say))
        for job in jobs:
            job.result()
    tags = {base: base.tag for base in stand_ins.values()}
    if replica:
        tags[PYTHON] = build_replica_base(say)
    return {image: tags[base] for image, base in stand_ins.items()}


def debian_mirror() -> str | None:
    """The Debian mirror that this machine uses itself; None on one that uses none, such as Ubuntu."""
    found = ask("apt-get", "indextargets", "--format", "$(ORIGIN) $(REPO_URI)", "Created-By: Packages").stdout
    own = re.search(r"^Debian (\S+/debian)/?$", found, re.MULTILINE)
    return own.group(1) if own else None


def build_debian(base: DebianBase, say: Say) -> None:
    """Makes one base image, `base.tag`, from Debian's packages. A Problem where it cannot be built."""
    say(f"building {base.tag} from Debian's packages")
    mirror = debian_mirror()
    # forky is a testing suite, whose release files run out within days on a mirror that lags
    make = [*as_root("mmdebstrap"), "--quiet", "--variant=essential", '--aptopt=Acquire::Check-Valid-Until "false"']
    make += [f"--dpkgopt=path-exclude=/usr/share/{folder}/*" for folder in ("doc", "man", "locale", "i18n")]
    make += [f"--include={','.join(base.packages)}", *(f"--customize-hook={line}" for line in base.finish)]
    # without a mirror, mmdebstrap takes Debian's own
    make += [base.suite, "-", *([f"deb {mirror} {base.suite} main"] if mirror else [])]
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    load = ["docker", "import", f"--change=ENV PATH={path}", "-", base.tag]
    with LOG.open("a") as log:
        tree = subprocess.Popen(make, stdout=subprocess.PIPE, stderr=log)
        assert tree.stdout
        # closed here as well: what packs the tree would wait for ever for a reader that ended early
        with tree.stdout:
            loaded = subprocess.run(load, stdin=tree.stdout, stdout=log, stderr=log)
        if tree.wait() or loaded.returncode:
            raise Problem(
                f"{base.tag} could not be built from Debian's packages",
                f"see the end of {LOG.relative_to(ROOT)}; is a Debian mirror reachable?",
            )


def lay_wheels(build: Build, needed: bool, say: Say) -> None:
    """Makes `wheels` beside a service's Dockerfile hold its packages, for Debian's Python, or none of them."""
    folder, packages = build.context / "wheels", build.args.get("PACKAGES", "").split()
    wanted, complete = "\n".join(packages), folder / "complete"
    # where the official image brings more than Python, what stands in for it is listed
    if not packages:
        listed = ROOT / "images" / build.context.name / "requirements.txt"
        wanted, packages = listed.read_text(), ["--no-deps", f"--requirement={listed}"]
    if needed and complete.exists() and complete.read_text() == wanted:
        return
    for old in (complete, *folder.glob("*.whl")):
        old.unlink(missing_ok=True)
    if needed:
        work([*fetch_wheels(folder), *packages], say, fix="check the network, or pip's configuration, and run it again")
        complete.write_text(wanted)


def lay_further_wheels(folder: Path, wanted: list[str], needed: bool) -> None:
    """Makes a folder hold the wheels that these words of `pip download` ask for, for Debian's Python, or none."""
    complete, recipe_ = folder / "complete", "\n".join(wanted)
    if needed and complete.exists() and complete.read_text() == recipe_:
        return
    for old in (complete, *folder.glob("*.whl")):
        old.unlink(missing_ok=True)
    if needed:
        fix = "check the network, or pip's configuration, and run it again"
        work([*fetch_wheels(folder), *wanted], console.log, fix=fix)
        complete.write_text(recipe_)


def fetch_wheels(folder: Path) -> list[str]:
    """A `pip download` into a folder for Debian's Python: it decides which wheels fit, not the one that runs this."""
    platforms = ["manylinux1", "manylinux2010", "manylinux2014", *(f"manylinux_2_{minor}" for minor in range(5, 37))]
    fetch = [sys.executable, "-m", "pip", "download", "--only-binary=:all:", "--disable-pip-version-check"]
    fetch += [f"--dest={folder}", "--implementation=cp", f"--python-version={PYTHON_OF_THE_WHEELS}"]
    return fetch + [f"--platform={name}_x86_64" for name in platforms]


def gather_wheels(say: Say) -> None:
    """Fetches the wheels of the replica's base image into WHEELS, once. A Problem where no index gives them."""
    wanted = WHEEL_LIST.read_text()
    complete = WHEELS / WHEEL_LIST.name
    if complete.exists() and complete.read_text() == wanted:
        return
    fetch = [*fetch_wheels(WHEELS), "--no-deps"]
    torch = re.search(r"^torch==\S+", wanted, re.MULTILINE)
    assert torch
    others = CACHE / "wheels-without-torch.txt"
    others.write_text(wanted.replace(torch.group(), ""))
    fix = "check the network, or pip's configuration, and run `make up` again"
    work([*fetch, "--requirement", str(others)], say, fix=fix)
    try:
        work([*fetch, torch.group()], say, fix=fix)
    except Problem:
        # The public package index has PyTorch with CUDA only.
        work([*fetch, "--index-url", PYTORCH_CPU_INDEX, torch.group()], say, fix=fix)
    complete.write_text(wanted)


def final_tag(base: DebianBase) -> str:
    """What an image is built over: Debian's base, for replicas the one with the wheels installed."""
    if base is not PYTHON:
        return base.tag
    return f"vllm-fleet/base-replica:{digest(PYTHON.tag, WHEEL_LIST.read_text(), REPLICA_DOCKERFILE.read_text())}"


def build_replica_base(say: Say) -> str:
    """Installs the wheels over Debian's Python; needs no network. Returns the image's tag."""
    tag = final_tag(PYTHON)
    if not present(tag):
        build = ["docker", "buildx", "build", "--load", "--progress=plain", "--network=none", f"--tag={tag}"]
        recipe = [f"--build-arg=BASE={PYTHON.tag}", f"--file={REPLICA_DOCKERFILE}", str(WHEELS)]
        work([*build, *recipe], say, fix=f"delete {WHEELS} and run `make up` again")
    return tag
