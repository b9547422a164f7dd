"""Gateway: where requests went and why, what failed, what was refused, and whether affinity finds what it expects."""

from grafana.panels import (
    ENGINE,
    GATEWAY,
    REPLICAS,
    REQUESTS,
    WHOLE,
    Dashboard,
    Panel,
    Query,
    by,
    of_model,
    p95_per_replica,
    per_replica,
    quantiles,
    rate,
    states,
    total,
)

MODELS = 'job="gateway",model=~"$model"'
EXPECTED = rate("gateway_expected_cached_tokens_total", MODELS)
MISSED = rate("gateway_missed_cached_tokens_total", MODELS)
MATCHED = f'{WHOLE},result="matched"'
CACHED = f'{REQUESTS},kind="cached"'
PROMPTS = f'{REQUESTS},kind="prompt"'
# Triton does not say what it computed.
CHARGED = f'{REQUESTS},kind=~"prompt|completion",replica!~"triton.*"'
OWN = of_model(rate("gateway_probe_tokens_total", GATEWAY))
COUNTED = f"sum({rate('gateway_tokens_total', CHARGED)}) + sum({OWN})"
COMPUTED = f"sum({rate('vllm:prompt_tokens_total', ENGINE)}) + sum({rate('vllm:generation_tokens_total', ENGINE)})"
PROBES = f'{GATEWAY},result=~"token|no_token"'
NOTHING_EXPECTED = "no prompt repeats, or ROUTE_POLICY looks at none."


def missed(labels: str) -> list[Query]:
    """The share of the expected tokens that the engines did not find, one line for each value of the labels."""
    legend = " ".join(f"{{{{{label}}}}}" for label in labels.split(", "))
    return [Query(f"sum by ({labels}) ({MISSED}) / sum by ({labels}) ({EXPECTED})", legend)]


DASHBOARD = Dashboard(
    uid="gateway",
    title="Gateway",
    description="Where requests went and why, what failed, what was refused, and who breaks the cache.",
    sections={
        "Requests": [
            Panel(
                "By status",
                "reqps",
                by("status", rate("gateway_requests_total", REQUESTS)),
                "What clients were told. 2xx: all is well; 4xx: their own mistake; 429: too much; 499: the client went"
                " away; 5xx: a failure, look at retries and refusals.",
                stacked=True,
            ),
            Panel(
                "By reason of the choice",
                "reqps",
                by("reason", rate("gateway_requests_total", REQUESTS)),
                "Why the gateway chose the replica. prefix: it has the prompt's beginning in its cache; session: the"
                " conversation began there; load: it was the least busy; turn: it was next; retry: another had"
                " failed; wake: it was asleep; fallback: none was ready; refused: there was none at all. Many retries"
                " or fallbacks: look at the states.",
                stacked=True,
            ),
            Panel(
                "By replica",
                "reqps",
                per_replica(rate("gateway_requests_total", f'{REQUESTS},replica!=""')),
                "Requests a second that each replica got. Uneven lines are affinity at work, unless one replica also"
                " has more in flight for long.",
            ),
            Panel(
                "In flight",
                "short",
                per_replica(of_model(f"gateway_requests_in_flight{{{GATEWAY}}}")),
                "Requests that the gateway has given to each replica and that have not ended. A line that only rises:"
                " that replica hangs, look at its state.",
            ),
            Panel(
                "Time to first byte",
                "s",
                quantiles("gateway_time_to_first_byte_seconds", GATEWAY, of_model),
                "From the request's arrival at the gateway to the first byte of the answer: what clients feel, with"
                " retries and queues. Far above the engines' TTFT: look at retries.",
            ),
            Panel(
                "Whole request, p95 per replica",
                "s",
                p95_per_replica("gateway_request_duration_seconds", GATEWAY, of_model),
                "From the request's arrival at the gateway to the last byte of the answer. If one replica stands out,"
                " look at it on the dashboard Replica.",
            ),
        ],
        "Trouble": [
            Panel(
                "Replica states",
                "short",
                states(),
                "ready: takes requests; asleep: wakes for one; loading: has not answered yet; draining: finishes what"
                " it has; stopped: by the autoscaler; wedged: lives but makes no token; unreachable: does not answer."
                " Look at the log of the last two.",
                kind="state-timeline",
                width=24,
            ),
            Panel(
                "Retries",
                "reqps",
                by("replica, cause", of_model(rate("gateway_retries_total", GATEWAY))),
                "Tries a second that failed on a replica before the first byte and went on to the next. connect: no"
                " connection; reset: it broke; timeout: no answer in time; failed: the engine broke; refused: the"
                " replica was full; draining: it was being stopped; asleep: it did not wake. Look at the log of the"
                " replica that is named.",
            ),
            Panel(
                "Refusals",
                "reqps",
                by("cause", rate("gateway_refusals_total", WHOLE)),
                "Requests a second that the gateway itself refused, of all models. full: every replica refused, add"
                " one; failed: two broke on it; none_ready: no replica was ready; asleep: the model did not wake in"
                " time; unknown_model: nobody serves it;"
                " key, role: not let in; limit, quota: the key had no more; bodies: too many bytes on their way; url,"
                " host, origin, media, connection: a browser's page, or a request that is none of ours.",
            ),
            Panel(
                "Streams cut",
                "reqps",
                by("replica", of_model(rate("gateway_streams_cut_total", GATEWAY))),
                "Streams a second that had begun when their replica was lost; their clients saw an error. Above 0: look"
                " at the end of that replica's log.",
                alarm=0.01,
            ),
            Panel(
                "Probes",
                "reqps",
                by("replica, result", of_model(rate("gateway_probes_total", PROBES))),
                "One-token requests by which the gateway sees whether a replica still works. no_token: that replica was"
                " wedged, and its log may say why.",
            ),
            Panel(
                "Bodies on their way",
                "bytes",
                by("place", f"gateway_body_bytes{{{WHOLE}}}"),
                "Bytes of requests' bodies that lie in the gateway: in memory up to 256 MiB, on disk up to"
                " GATEWAY_BODIES_MB. At a limit, requests are refused (cause bodies): find who sends so much.",
                warn=200 * 2**20,
            ),
            Panel(
                "Writes lost",
                "short",
                by("zone", f"increase(gateway_writes_lost_total{{{WHOLE}}}[$__rate_interval])"),
                "Writes of the gateway that found no room in a zone of its memory. Above 0, what it knows of replicas,"
                " models or counts has gaps: make that zone larger in nginx/conf.d/njs.conf.",
                alarm=1,
            ),
        ],
        "Affinity": [
            Panel(
                "Expected in the cache, and not found there",
                "short",
                total(EXPECTED, "expected") + total(MISSED, "not found"),
                "Tokens a second of prompts that the chosen replica's cache should have had: what it was sent before,"
                " and the beginning of a conversation that goes on. Where many are not found for all clients, the"
                " caches are too small; where for one, see the panels beside.",
                empty=NOTHING_EXPECTED,
            ),
            Panel(
                "Who breaks the cache: programs",
                "percentunit",
                missed("client"),
                "Share of the tokens that a cache should have had and had not, by the client's program. Near 100 %"
                " for one: it changes the beginning of its prompt each turn, with a clock or an id."
                " docs/dashboards.md says how to find and mend it.",
                ceiling=1,
                warn=0.5,
                empty=NOTHING_EXPECTED,
            ),
            Panel(
                "Who breaks the cache: keys",
                "percentunit",
                missed("key"),
                "The same by key. Tell its holder: a prompt's beginning must stay as it was, and what changes belongs"
                " at its end.",
                ceiling=1,
                warn=0.5,
                empty=NOTHING_EXPECTED,
            ),
            Panel(
                "Tokens computed twice, by program and key",
                "short",
                by("client, key", MISSED),
                "Tokens a second that engines computed though a cache should have had them: what a broken beginning"
                " costs. Begin with the largest.",
                stacked=True,
                empty=NOTHING_EXPECTED,
            ),
            Panel(
                "Blocks matched by the gateway",
                "percentunit",
                [
                    Query(
                        f"sum({rate('gateway_prefix_blocks_total', MATCHED)})"
                        f" / sum({rate('gateway_prefix_blocks_total', WHOLE)})",
                        "matched",
                    )
                ],
                "Share of the prompts' blocks that the gateway had sent to the same replica before, of all models. It"
                " counts blocks and the engines count tokens: watch how it moves. A fall means other prompts, or a"
                " restart of the gateway.",
                ceiling=1,
            ),
            Panel(
                "Found by the engines",
                "percentunit",
                [
                    Query(
                        f"sum by (model) ({rate('gateway_tokens_total', CACHED)})"
                        f" / sum by (model) ({rate('gateway_tokens_total', PROMPTS)})",
                        "{{model}}",
                    )
                ],
                "Share of the prompts' tokens that the engines had in their caches, by their own word. If it falls"
                " while the gateway's matches do not, the caches forget: give them more memory.",
                ceiling=1,
                empty="nothing was found in a cache since the gateway began.",
            ),
        ],
        "Watching": [
            Panel(
                "Scraped",
                "short",
                [
                    Query('up{job=~"gateway|prometheus"}', "{{job}}"),
                    Query(of_model(f"up{{{REPLICAS}}}"), "{{replica}}"),
                ],
                "1 while Prometheus can read the target. At 0, the panels show nothing for it: see its page Targets.",
                ceiling=1,
                width=6,
            ),
            Panel(
                "Series kept",
                "short",
                [Query('prometheus_tsdb_head_series{job="prometheus"}', "series")],
                "Time series in Prometheus' memory. They grow with replicas, keys and models. If they grow with the"
                " requests, something has a label too many.",
                width=6,
            ),
            Panel(
                "Counted, of what the engines computed",
                "percentunit",
                [Query(f"({COUNTED}) / ({COMPUTED})", "counted")],
                "Tokens of prompts and answers that the gateway charged to keys, or that are its own one-token"
                " requests, over those that the engines computed. Over minutes it should be near 100 %: see"
                " BooksDoNotBalance in docs/runbook.md.",
                width=6,
            ),
            Panel(
                "Answers without a count",
                "reqps",
                total(rate("gateway_unmetered_total", WHOLE), "answers"),
                "Answers a second whose replica did not say what they used, so that no key is charged. Above 0: a path"
                " or an engine that the gateway cannot meter.",
                alarm=0.1,
                width=6,
            ),
        ],
    },
)
