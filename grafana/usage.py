"""Usage: who used how much, by key, end user, model and day."""

from grafana.panels import MODEL, REPLICA, REQUESTS, WHOLE, Dashboard, Panel, Query, Variable, by, rate

KEY = Variable("key", "Key", 'label_values(gateway_key_requests_total{job="gateway"}, key)')
USED = f'{REQUESTS},key=~"$key"'
NO_END_USERS = "no key is marked to name its end users (docs/access.md)."
DAYS = 14


def of_kind(kind: str) -> str:
    """Labels of tokens of one kind (`prompt`, `cached`, `completion`)."""
    return f'{USED},kind="{kind}"'


def sums(labels: str, more: str = "") -> list[Query]:
    """Columns of a table: what was used in the time shown, by labels."""
    columns = {
        "tokens made": f'gateway_tokens_total{{{USED}{more},kind="completion"}}',
        "prompt tokens": f'gateway_tokens_total{{{USED}{more},kind="prompt"}}',
        "of these cached": f'gateway_tokens_total{{{USED}{more},kind="cached"}}',
        "requests": f"gateway_key_requests_total{{{USED}{more}}}",
    }
    return [Query(f"sum by ({labels}) (increase({series}[$__range]))", name) for name, series in columns.items()]


def made(labels: str, more: str = "") -> list[Query]:
    """Prompt and completion tokens a second, one line for each value of the labels."""
    counted = rate("gateway_tokens_total", f'{USED}{more},kind=~"prompt|completion"')
    return [Query(f"sum by ({labels}) ({counted})", " ".join(f"{{{{{label}}}}}" for label in labels.split(", ")))]


DASHBOARD = Dashboard(
    uid="usage",
    title="Usage",
    description="Who used how much, by the engines' own word. `make usage` gives the same as a table or CSV.",
    variables=[MODEL, REPLICA, KEY],
    span="24h",
    sections={
        "In the time shown": [
            Panel(
                "Keys",
                "short",
                sums("key"),
                "What each key used. Where no keys are asked for, its name is empty. To bound one, give it limits:"
                " `make key`.",
                kind="table",
                width=12,
                decimals=0,
                labels=("key",),
            ),
            Panel(
                "Models",
                "short",
                sums("model"),
                "What each model was used for. One that nobody uses can give its GPUs to another.",
                kind="table",
                width=12,
                decimals=0,
                labels=("model",),
            ),
            Panel(
                "End users",
                "short",
                sums("key, end_user", ',end_user!=""'),
                "What each end user used, of keys that may name them. To bound them, give the key limits for its end"
                " users.",
                kind="table",
                width=24,
                decimals=0,
                labels=("key", "end_user"),
                empty=NO_END_USERS,
            ),
        ],
        "Over time": [
            Panel(
                "Tokens by key",
                "short",
                made("key"),
                "Tokens a second, of prompts and answers. Who rises while others wait takes more than a share: a limit"
                " or a lower priority helps (`make key`).",
                stacked=True,
            ),
            Panel(
                "Tokens by model",
                "short",
                made("model"),
                "Tokens a second, of prompts and answers. Compare with how busy that model's replicas are before you"
                " add one.",
                stacked=True,
            ),
            Panel(
                "Tokens by end user",
                "short",
                made("key, end_user", ',end_user!=""'),
                "Tokens a second, of prompts and answers. One that stands out may be a program that runs away.",
                stacked=True,
                empty=NO_END_USERS,
            ),
            Panel(
                "Requests by key",
                "reqps",
                [Query(f"sum by (key) ({rate('gateway_key_requests_total', USED)})", "{{key}}")],
                "Requests a second that a replica answered. Many with few tokens: a client that polls or retries.",
                stacked=True,
            ),
            Panel(
                "Cached share by key",
                "percentunit",
                [
                    Query(
                        f"sum by (key) ({rate('gateway_tokens_total', of_kind('cached'))})"
                        f" / sum by (key) ({rate('gateway_tokens_total', of_kind('prompt'))})",
                        "{{key}}",
                    )
                ],
                "Share of a key's prompt tokens that the engines had in their caches. If it is low though its prompts"
                " repeat, see who breaks the cache on the dashboard Gateway.",
                ceiling=1,
                empty="nothing was found in a cache since the gateway began.",
            ),
            Panel(
                "Refused by limits",
                "reqps",
                by("cause", rate("gateway_refusals_total", f'{WHOLE},cause=~"limit|quota"')),
                "Requests a second that were told 429 because their key had no more, of all keys and models. limit:"
                " of this minute; quota: of this day or month. `make key ARGS='list'` shows the limits, the log whose"
                " they were.",
                stacked=True,
            ),
        ],
        "By day": [
            Panel(
                "Tokens a day, by key",
                "short",
                [
                    Query(
                        f'sum by (key) (increase(gateway_tokens_total{{{USED},kind=~"prompt|completion"}}[1d]))',
                        "{{key}}",
                    )
                ],
                "Tokens of prompts and answers in the 24 hours before each bar, which stands at midnight UTC. `make"
                " usage ARGS='--days 30'` has the figures.",
                width=12,
                stacked=True,
                days=DAYS,
            ),
            Panel(
                "Tokens a day, by kind",
                "short",
                [
                    Query(f"sum(increase(gateway_tokens_total{{{of_kind(kind)}}}[1d]))", kind)
                    for kind in ("prompt", "cached", "completion")
                ],
                "Cached tokens are a part of the prompts'. If prompts grow from day to day and answers do not, look at"
                " what clients put into them.",
                width=12,
                days=DAYS,
                empty="nothing was found in a cache since the gateway began.",
            ),
        ],
    },
)
