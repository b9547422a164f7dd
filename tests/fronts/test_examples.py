"""Every file of examples/ runs as it stands in docs/clients.md, through the gateway, with a key.

Each brings its own packages, through uv or npm. What is fetched once is kept in their caches.
"""

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from stack.shell import ROOT
from tests.fronts.conftest import Door
from tests.gateway.sdks import NODE, NPM

EXAMPLES = ROOT / "examples"
BIN = Path(sys.executable).parent
# Their instructions are longer than the small model's whole context.
AGENTS = {"aider.sh", "claude_code.sh", "codex.sh", "opencode.sh"}
SCRIPTS = sorted(
    path.name for path in EXAMPLES.iterdir() if path.suffix in {".py", ".mjs", ".sh"} and path.name != "page.py"
)
LIMIT_S = 240


def run(name: str, door: Door, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs an example as a user would who has set where the fleet is."""
    tools = folder / "bin"
    tools.mkdir()
    (tools / "node").symlink_to(NODE)
    (tools / "npx").write_text(f'#!/bin/sh\nexec "{NODE}" "{NPM.with_name("npx-cli.js")}" "$@"\n')
    (tools / "npx").chmod(0o755)
    env = {
        "PATH": f"{tools}:{BIN}:{os.environ['PATH']}",
        "HOME": str(folder),
        "MODEL": door.model,
        "OPENAI_BASE_URL": f"{door.gateway.url}/v1",
        "OPENAI_API_KEY": door.key,
        "ANTHROPIC_BASE_URL": door.gateway.url,
        "ANTHROPIC_API_KEY": door.key,
        "UV_CACHE_DIR": str(ROOT / ".cache" / "uv"),
        "NPM_CONFIG_CACHE": str(ROOT / ".cache" / "npm"),
        "UV_SYSTEM_CERTS": "1",
        **{
            name: value
            for name, value in os.environ.items()
            if name.startswith(("PIP_", "SSL_", "NPM_CONFIG_REG", "NODE_EXTRA"))
        },
    }
    if name.endswith(".py"):
        command = ["uv", "run", "--quiet", "--no-project", str(EXAMPLES / name)]
    elif name.endswith(".mjs"):
        package = (EXAMPLES / name).read_text().split("\n")[0].removeprefix("// ")
        script = folder / name
        script.write_text((EXAMPLES / name).read_text())
        subprocess.run(
            [str(NODE), str(NPM), "install", "--silent", package], cwd=folder, env=env, check=True, timeout=LIMIT_S
        )
        command = ["node", str(script)]
    else:
        command = ["sh", str(EXAMPLES / name)]
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=LIMIT_S, stdin=subprocess.DEVNULL
    )


@pytest.fixture
def door(request: pytest.FixtureRequest) -> Door:
    """The real replicas, and the simulated ones for agents."""
    found: Door = request.getfixturevalue("simulated" if request.param in AGENTS else "real")
    return found


def used(door: Door) -> int:
    """Tokens that the user's key has had."""
    usage = httpx.get(f"{door.gateway.url}/v1/usage", headers={"Authorization": f"Bearer {door.key}"}).json()
    return int(usage["tokens"].get("completion", 0))


@pytest.mark.parametrize(("name", "door"), [(name, name) for name in SCRIPTS], indirect=["door"], ids=SCRIPTS)
def test_an_example_gets_its_answer(name: str, door: Door, tmp_path: Path) -> None:
    before = used(door)
    done = run(name, door, tmp_path)
    assert done.returncode == 0, f"{done.stdout[-1000:]}\n{done.stderr[-2000:]}"
    assert done.stdout.strip()
    # and the answer is on the key's bill
    assert used(door) > before
