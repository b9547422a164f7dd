"""Every test here starts gateways from the gateway's image."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def _image(gateway_image: None) -> None: ...
