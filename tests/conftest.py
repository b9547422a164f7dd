"""What tests of more than one folder share: the running stack."""

from collections.abc import Iterator

import hypothesis
import pytest

from lab.stack import Stack, StackError, run

# How long an example takes is the host's business: with a deadline, a busy one would fail what is right.
hypothesis.settings.register_profile("fleet", deadline=None)
hypothesis.settings.load_profile("fleet")


def is_up() -> bool:
    """Whether the gateway runs already. Without Docker it cannot."""
    try:
        return bool(run("docker", "compose", "ps", "--status", "running", "--quiet", "gateway").strip())
    except StackError:
        return False


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """The real stack. One that is up is used and stays up; else it is started by `make up` and stopped at the end."""
    found_up = is_up()
    if not found_up:
        run("make", "up", timeout_s=1800)
    running = Stack.find()
    running.wait_ready()
    yield running
    if not found_up:
        run("make", "down", timeout_s=300)


@pytest.fixture(scope="session")
def gateway_image(request: pytest.FixtureRequest) -> None:
    """The gateway's image, for tests that start gateways of their own: where it is missing, `make up` makes it."""
    try:
        image = run("docker", "compose", "config", "--images", "gateway").split()[0]
        run("docker", "image", "inspect", image)
    except StackError:
        request.getfixturevalue("stack")
