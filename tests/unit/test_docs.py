"""What the docs name is there: make targets, files, links, settings, services. What they show is run in tests/stack."""

import re
from pathlib import Path

import pytest
import yaml

from lab.http import KEY
from stack.settings import names_of_users
from stack.shell import ROOT

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *(ROOT / "docs").rglob("*.md")])
# What `make up`, `make plan` or a user makes; not in a clone.
MADE = (".env", ".venv", "docker-compose.override.yml", "secrets/")


class ComposeLoader(yaml.SafeLoader):
    """YAML with the tags that Compose adds."""


def listed(loader: yaml.SafeLoader, node: yaml.Node) -> object:
    """A list or a mapping in place of another."""
    assert isinstance(node, yaml.MappingNode | yaml.SequenceNode)
    return loader.construct_mapping(node) if isinstance(node, yaml.MappingNode) else loader.construct_sequence(node)


ComposeLoader.add_constructor("!override", listed)
# in what `make up ARGS='--replicas …'` writes
ComposeLoader.add_constructor("!reset", lambda *_: None)

in_every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def code(page: Path) -> list[str]:
    """Every line of the code blocks and every piece of inline code of a page."""
    text = page.read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return lines + re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@in_every_page
def test_make_targets_exist(page: Path) -> None:
    """Each `make TARGET` is a target of the Makefile."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {target for line in code(page) for target in re.findall(r"(?:^|&& )make ([a-z-]+)", line)}
    assert named <= targets


@in_every_page
def test_links_lead_somewhere(page: Path) -> None:
    """Each link to a file of the repository leads to it, and to a heading that it has."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@in_every_page
def test_files_exist(page: Path) -> None:
    """Each path below a folder of the repository that the docs name in code is there."""
    folders = "|".join(
        path.name.replace(".", r"\.") for path in ROOT.iterdir() if path.is_dir() and path.name != ".git"
    )
    for line in code(page):
        for path in re.findall(rf"(?<![\w/.~-])(?:\./)?((?:{folders})/[\w./-]*\w)", line):
            if not path.startswith((*MADE, "models/")):
                assert (ROOT / path).exists(), f"{path} (in: {line})"


@in_every_page
def test_settings_exist(page: Path) -> None:
    """Each NAME=value in the docs sets a setting that .env.example explains, or one of the hub's."""
    if page.name == "clients.md":
        return  # settings of other programs, in files that make test-fronts runs
    known = set(re.findall(r"^#? ?([A-Z][A-Z0-9_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    known |= {"ARGS", KEY, "PYTHONPATH", "HF_TOKEN"}
    named = {name for line in code(page) for name in re.findall(r"(?<![\w$-])([A-Z][A-Z0-9_]{2,})=", line)}
    users = [users for line in code(page) for users in re.findall(r"^USER_LIST=(\S+)", line)]
    known |= names_of_users(",".join(users))
    assert {name for name in named if not name.startswith("COMPOSE_")} <= known


@in_every_page
def test_services_exist(page: Path) -> None:
    """Each service that a `docker compose` command names is one of the Compose file's."""
    files = [yaml.load(path.read_text(), Loader=ComposeLoader) for path in ROOT.glob("docker-compose*.yml")]  # noqa: S506
    services = {name for file in files for name in file["services"]}
    verbs = r"docker compose (?:exec|logs|restart|stop|start|kill|rm|up|run|port)((?: -[\w-]+(?: \d+)?)*) ([a-z][\w-]*)"
    named = {service for line in code(page) for _, service in re.findall(verbs, line)}
    assert {re.sub(r"^vllm-\d+$", "vllm-0", service) for service in named} <= services
