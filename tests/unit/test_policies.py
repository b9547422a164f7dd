"""The route's policies: one list of them, wherever they stand."""

import re
from typing import get_args

from stack import settings
from stack.shell import ROOT

# The table at the end of the module, in its order: `export default { first, second };`.
TABLE = re.search(r"^export default \{ ([\w, ]+) \};$", (ROOT / "nginx/njs/policies.js").read_text(), re.MULTILINE)
POLICIES = TABLE[1].split(", ") if TABLE else []


def test_the_gateway_has_policies() -> None:
    assert POLICIES[0] == "prefix"
    assert len(POLICIES) == len(set(POLICIES)) > 1


def test_make_up_takes_the_policies_of_the_gateway_and_no_others() -> None:
    literal, none = get_args(settings.Settings.model_fields["route_policy"].annotation)
    assert list(get_args(literal)) == POLICIES
    assert none is type(None)


def test_the_example_names_every_policy_and_shows_the_default() -> None:
    comment, default = re.findall(
        r"((?:^# .*\n)+)#ROUTE_POLICY=(\w+)$", settings.EXAMPLE_FILE.read_text(), re.MULTILINE
    )[0]
    assert default == POLICIES[0]
    # "How a replica is chosen: one (what it does), two, or three (what it does)."
    listed = re.sub(r"\([^)]*\)", "", comment.replace("\n# ", " ")).split(":")[1].split(".")[0]
    assert re.findall(r"\w+", listed.replace(" or ", " ")) == POLICIES


def test_the_design_names_every_policy() -> None:
    design = (ROOT / "docs/design.md").read_text()
    paragraph = next(part for part in re.split(r"\n(?=\d\. )", design) if "`ROUTE_POLICY` says" in part)
    assert set(POLICIES) <= set(re.findall(r"`(\w+)`", paragraph))
