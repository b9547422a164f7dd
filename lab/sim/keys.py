"""Keys for a gateway of the lab, as `make key` makes them."""

import secrets
from collections.abc import Mapping
from typing import Any

from access.keys import PREFIX, Hash, Key, Keys, sha256


def keyed(rights: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, str], dict[str, bytes]]:
    """New keys by their holders' names, and the file of the gateway that has them. `rights`: fields of Key by name."""
    made = {name: PREFIX + secrets.token_urlsafe(32) for name in rights}
    entries = [
        Key(id=f"k{number:07x}", name=name, hashes=[Hash(sha256=sha256(made[name]))], **rights[name])
        for number, name in enumerate(rights)
    ]
    return made, {"secrets/keys.json": Keys(keys=entries).model_dump_json().encode()}
