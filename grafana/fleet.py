"""Fleet: one screen that a person on call reads in ten seconds. Is it well, what is slow, who is busy?"""

from grafana.panels import (
    ENGINE,
    GATEWAY,
    PAGE,
    REQUESTS,
    WHOLE,
    Dashboard,
    Panel,
    Query,
    burn,
    by,
    numbered,
    of_model,
    p95_per_replica,
    per_replica,
    rate,
    states,
    total,
)

READY = of_model(f'gateway_replica_state{{{GATEWAY},state="ready"}}')

AUTOSCALER = 'job="autoscaler"'
NO_AUTOSCALER = "COMPOSE_PROFILES in .env does not have autoscaler."
# The causes of autoscaler/decide.py.
CAUSES = {
    "steady": "green",
    "idle": "gray",
    "queue": "orange",
    "full": "orange",
    "kv": "orange",
    "busy": "orange",
    "timetable": "blue",
    "bounds": "blue",
    "lost": "red",
    "blind": "red",
}

DASHBOARD = Dashboard(
    uid="fleet",
    title="Fleet",
    description="Is it well, what is slow, who is busy. The others say why: Replica, Gateway, Usage, Hardware.",
    sections={
        "Is it well": [
            Panel(
                "Replicas not ready",
                "short",
                [Query(f"count({READY}) - sum({READY})", "not ready")],
                "Replicas that take no new requests. Above 0: the states below say which, and its log says why.",
                kind="stat",
                width=4,
                alarm=1,
            ),
            Panel(
                "Alerts firing",
                "short",
                [Query('count(ALERTS{alertstate="firing"}) or vector(0)', "firing")],
                "Alerts that fire now. Above 0: Prometheus lists them on its page Alerts, each with its runbook.",
                kind="stat",
                width=4,
                warn=1,
            ),
            Panel(
                "Failures",
                "short",
                burn("availability"),
                "How many times the failures are that slo.yml allows: requests that ended with a 5xx. Alerts page at"
                f" {PAGE}. Above 1, look at retries and refusals on the dashboard Gateway.",
                kind="stat",
                width=4,
                decimals=1,
                warn=1,
                alarm=PAGE,
                empty="nobody asks.",
            ),
            Panel(
                "Late first tokens",
                "short",
                burn("ttft"),
                "How many times the first tokens are late that slo.yml allows (TTFT). Above 1: if requests wait, add a"
                " replica; else the prompts have become longer or miss the cache.",
                kind="stat",
                width=4,
                decimals=1,
                warn=1,
                alarm=PAGE,
                empty="nobody asks.",
            ),
            Panel(
                "Late next tokens",
                "short",
                burn("itl"),
                "How many times the tokens are late after the one before that slo.yml allows (ITL). Above 1: lower"
                " MAX_NUM_SEQS, or add a replica.",
                kind="stat",
                width=4,
                decimals=1,
                warn=1,
                alarm=PAGE,
                empty="nobody asks.",
            ),
            Panel(
                "Refused, fleet full",
                "reqps",
                total(rate("gateway_refusals_total", f'{WHOLE},cause="full"'), "full"),
                "Requests a second that were told 429 because every replica was full. Above 0: add a replica, or limit"
                " who sends most (dashboard Usage). Of all models together.",
                kind="stat",
                width=4,
                alarm=0.01,
            ),
            Panel(
                "Replica states",
                "short",
                states(),
                "ready: takes requests; asleep: wakes for one; loading: has not answered yet; draining: finishes what"
                " it has; stopped: by the autoscaler; wedged: lives but makes no token; unreachable: does not answer."
                " Look at the log of the last two.",
                kind="state-timeline",
                width=24,
                height=4,
            ),
        ],
        "What is slow": [
            Panel(
                "First token, p95 per replica",
                "s",
                p95_per_replica("vllm:time_to_first_token_seconds", ENGINE),
                "TTFT. If one line is far above the others, that"
                " replica is slow or its queue is long. If all are, the fleet is full.",
                height=6,
            ),
            Panel(
                "Next token, p95 per replica",
                "s",
                p95_per_replica("vllm:inter_token_latency_seconds", ENGINE),
                "ITL. If one line is far above the others, that replica's GPU is slower, hotter or shared.",
                height=6,
            ),
            Panel(
                "Waiting",
                "short",
                per_replica(f"vllm:num_requests_waiting{{{ENGINE}}}"),
                "Requests that wait in each engine. On one replica only: the load is uneven. On all: the fleet is full,"
                " add a replica.",
                height=6,
            ),
        ],
        "Who is busy": [
            Panel(
                "Requests",
                "reqps",
                by("status", rate("gateway_requests_total", REQUESTS)),
                "What clients were told. 2xx: all is well; 4xx: their own mistake; 429: too much; 5xx: a failure,"
                " look at the dashboard Gateway.",
                stacked=True,
                height=6,
            ),
            Panel(
                "Tokens made",
                "short",
                per_replica(rate("vllm:generation_tokens_total", ENGINE)),
                "Tokens a second that each replica makes: the fleet's useful work. If one line is at 0 while others"
                " work, look at its state.",
                height=6,
            ),
            Panel(
                "KV cache in use",
                "percentunit",
                [Query(f"max by (replica) (vllm:kv_cache_usage_perc{{{ENGINE}}})", "{{replica}}")],
                "Share of the KV blocks that running requests hold. Near 100 %, requests wait or are preempted: give"
                " the cache more memory or add a replica.",
                ceiling=1,
                warn=0.9,
                height=6,
            ),
        ],
        # Last, so that the others fill the screen where there is none.
        "Autoscaler": [
            Panel(
                "Replicas wanted and running",
                "short",
                [
                    Query(f"max(autoscaler_{what}_replicas{{{AUTOSCALER}}})", legend)
                    for what, legend in (
                        ("wanted", "wanted"),
                        ("serving", "running"),
                        ("loading", "loading"),
                        ("least", "least"),
                        ("most", "most"),
                    )
                ],
                "Replicas that there should be, that take requests and that load, between the bounds of MIN_REPLICAS,"
                " MAX_REPLICAS and the timetable. Fewer run than are wanted, for longer than a load takes: look at the"
                " states. The most are wanted, and requests wait: raise MAX_REPLICAS.",
                width=12,
                height=5,
                empty=NO_AUTOSCALER,
            ),
            Panel(
                "Cause of its decisions",
                "short",
                [Query(f"max({numbered('autoscaler_cause', AUTOSCALER, 'cause', CAUSES)})", "decision")],
                "Why it wants so many. steady: nothing is to change; queue, full, kv, busy: too few, as requests wait,"
                " are refused, fill the KV caches, or keep replicas as busy as they can be; idle: one less will do;"
                " timetable, bounds: a setting asks for it; lost: one does not serve; blind: it does not see enough,"
                " and changes nothing. `docker compose logs autoscaler` says each in a sentence.",
                kind="state-timeline",
                width=12,
                height=5,
                words=CAUSES,
                empty=NO_AUTOSCALER,
            ),
        ],
    },
)
