"""Replica: one vLLM whole. Its requests, its scheduler, its cache, its speculation, and the process itself."""

from grafana.panels import (
    ENGINE,
    REPLICAS,
    Dashboard,
    Panel,
    Query,
    by,
    mean,
    of_model,
    p95_per_replica,
    per_replica,
    quantile,
    quantiles,
    rate,
    share,
    total,
)

HTTP_ERRORS = f'{REPLICAS},http_request_method="POST",http_route=~"/v1/.+",http_response_status_code=~"[45].."'
NO_SPECULATION = "the replica has no SPECULATIVE_CONFIG."
DRAFTS = "vllm:spec_decode_num_drafts_total"
DRAFTED = "vllm:spec_decode_num_draft_tokens_total"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens_total"
POSITIONS = "vllm:spec_decode_num_accepted_tokens_per_pos_total"

DASHBOARD = Dashboard(
    uid="replica",
    title="Replica",
    description="One vLLM whole, or several side by side: choose it above.",
    sections={
        "Requests": [
            Panel(
                "Finished",
                "reqps",
                per_replica(rate("vllm:request_success_total", ENGINE)),
                "Requests a second that each engine has finished. If the lines differ under even load, look at the"
                " reasons for the choice on the dashboard Gateway.",
            ),
            Panel(
                "How they finished",
                "reqps",
                by("finished_reason", rate("vllm:request_success_total", ENGINE)),
                "stop: the model ended by itself; length: cut at max_tokens; abort: the client went away; error: look"
                " at the replica's log. Many that were cut: max_tokens is too small for what is asked.",
                stacked=True,
            ),
            Panel(
                "Errors answered",
                "reqps",
                by(
                    "replica, http_response_status_code",
                    of_model(rate("http_server_request_duration_seconds_count", HTTP_ERRORS)),
                ),
                "Errors a second that each replica answered with. 4xx is the client's mistake, 503 a full queue. Any"
                " other 5xx is the replica's: look at its log.",
                empty="there was no error since the replica began.",
            ),
            Panel(
                "Time to first token (TTFT)",
                "s",
                quantiles("vllm:time_to_first_token_seconds", ENGINE),
                "From a request's arrival in the engine to its first token. If it is long, look at the queue first,"
                " then at the length of the prompts and the cache.",
            ),
            Panel(
                "Inter-token latency (ITL)",
                "s",
                quantiles("vllm:inter_token_latency_seconds", ENGINE),
                "Time between one token and the next. It rises with the batch. Steps are other requests' long prompts:"
                " lower MAX_NUM_BATCHED_TOKENS.",
            ),
            Panel(
                "Time per output token (TPOT)",
                "s",
                quantiles("vllm:request_time_per_output_token_seconds", ENGINE),
                "Mean time per token of a request, after the first. One divided by it is the speed that a reader sees."
                " Too slow: fewer requests at once (MAX_NUM_SEQS), or more replicas.",
            ),
            Panel(
                "Whole request",
                "s",
                quantiles("vllm:e2e_request_latency_seconds", ENGINE),
                "From a request's arrival in the engine to its last token. It follows the length of the answers:"
                " compare it with the tokens below before you look for a fault.",
            ),
            Panel(
                "Prompt length",
                "short",
                quantiles("vllm:request_prompt_tokens", ENGINE),
                "Tokens in a prompt. Long ones make first tokens late, their own and those of others.",
            ),
            Panel(
                "Answer length",
                "short",
                quantiles("vllm:request_generation_tokens", ENGINE),
                "Tokens in an answer. If it grows, so does the time of whole requests, and fewer are done a second.",
            ),
        ],
        "Scheduler": [
            Panel(
                "Running",
                "short",
                per_replica(f"vllm:num_requests_running{{{ENGINE}}}"),
                "Requests in each engine's batch. A flat top is the limit MAX_NUM_SEQS: raise it if the KV cache has"
                " room.",
            ),
            Panel(
                "Waiting, by reason",
                "short",
                by("replica, reason", f"vllm:num_requests_waiting_by_reason{{{ENGINE}}}"),
                "capacity: no room in the batch or the cache; deferred: waits for something of its own, such as a"
                " transfer. Capacity on all replicas: the fleet is full, add one.",
            ),
            Panel(
                "Turned away",
                "reqps",
                by("replica, reason", rate("vllm:admission_rejections_total", ENGINE)),
                "Requests a second that the engine refused as its queue was full; the gateway takes them elsewhere."
                " If it lasts, add a replica, or raise MAX_NUM_QUEUED_REQS if clients would rather wait.",
            ),
            Panel(
                "Time in the queue",
                "s",
                p95_per_replica("vllm:request_queue_time_seconds", ENGINE),
                "95 of 100 requests waited less than this before the engine began their prompt. If it grows, the"
                " fleet is full: add a replica.",
            ),
            Panel(
                "Time for the prompt",
                "s",
                p95_per_replica("vllm:request_prefill_time_seconds", ENGINE),
                "95 of 100 prompts were computed within this. If it grows and the prompts do not, fewer of them are"
                " found in the cache, or the GPU is slower.",
            ),
            Panel(
                "Where a request's time goes",
                "s",
                [
                    mean("vllm:request_queue_time_seconds", ENGINE, "queue"),
                    mean("vllm:request_prefill_time_seconds", ENGINE, "prompt"),
                    mean("vllm:request_decode_time_seconds", ENGINE, "answer"),
                ],
                "All requests' time over their number. Work on the largest part: queue, more replicas; prompt, the"
                " cache; answer, a faster GPU, quantization or speculation.",
                stacked=True,
            ),
            Panel(
                "Tokens in a step",
                "short",
                quantiles("vllm:iteration_tokens_total", ENGINE),
                "Tokens that the engine computes in one step. Near MAX_NUM_BATCHED_TOKENS, prompts wait for each"
                " other.",
            ),
            Panel(
                "Tokens a second",
                "short",
                total(rate("vllm:prompt_tokens_total", ENGINE), "prompts")
                + total(rate("vllm:generation_tokens_total", ENGINE), "answers"),
                "Tokens of prompts, cached ones included, and tokens made. If answers fall while prompts rise, long"
                " prompts take the engine's time.",
            ),
            Panel(
                "Preemptions",
                "reqps",
                per_replica(rate("vllm:num_preemptions_total", ENGINE)),
                "Requests a second that went back into the queue because the KV cache was full. If it is not 0, lower"
                " MAX_NUM_SEQS or give the cache more memory.",
                alarm=0.1,
            ),
        ],
        "Cache": [
            Panel(
                "KV cache in use",
                "percentunit",
                [Query(f"max by (replica) (vllm:kv_cache_usage_perc{{{ENGINE}}})", "{{replica}}")],
                "Share of the KV blocks that running requests hold. Near 100 %, requests wait or are preempted: give"
                " the cache more memory (GPU_MEMORY_UTILIZATION, KV_CACHE_GB) or add a replica.",
                ceiling=1,
                warn=0.9,
            ),
            Panel(
                "Prefix cache hits",
                "percentunit",
                share("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total", ENGINE),
                "Share of the prompts' tokens that the engine found in its KV cache and did not compute again. If it is"
                " low though prompts repeat, see who breaks the cache on the dashboard Gateway.",
                ceiling=1,
            ),
            Panel(
                "Where prompts' tokens come from",
                "short",
                by("source", rate("vllm:prompt_tokens_by_source_total", ENGINE)),
                "Tokens a second that the engine computed, found in its own cache, or got from another one. The first"
                " are what prompts cost.",
                stacked=True,
            ),
        ],
        "Speculation": [
            Panel(
                "Guessed tokens accepted",
                "percentunit",
                share(ACCEPTED, DRAFTED, ENGINE),
                "Share of the guessed tokens that the model agreed to. Below a third, speculation costs more than it"
                " brings under load: guess fewer tokens, or take it out of SPECULATIVE_CONFIG.",
                ceiling=1,
                empty=NO_SPECULATION,
            ),
            Panel(
                "Tokens a step",
                "short",
                [
                    Query(
                        f"1 + sum by (replica) ({rate(ACCEPTED, ENGINE)}) / sum by (replica) ({rate(DRAFTS, ENGINE)})",
                        "{{replica}}",
                    )
                ],
                "Tokens that a request gains in one step, the model's own included. At 1 speculation brings nothing.",
                empty=NO_SPECULATION,
            ),
            Panel(
                "Accepted, by position",
                "percentunit",
                [
                    Query(
                        f"sum by (position) ({rate(POSITIONS, ENGINE)}) / ignoring (position) group_left"
                        f" sum({rate(DRAFTS, ENGINE)})",
                        "{{position}}",
                    )
                ],
                "How often the first, second, … guess was right. Positions near 0 are not worth guessing: lower"
                " num_speculative_tokens.",
                ceiling=1,
                empty=NO_SPECULATION,
            ),
        ],
        "Process": [
            Panel(
                "Running for",
                "s",
                [
                    Query(
                        f"min by (replica) ({of_model(f'(time() - process_start_time_seconds{{{REPLICAS}}})')})",
                        "{{replica}}",
                    )
                ],
                "Time since the replica's server began. If it falls again and again, the replica restarts: look at the"
                " end of its log, and at `docker compose ps --all` for the exit status (137: out of memory).",
            ),
            Panel(
                "Answers to HTTP, p95",
                "s",
                [
                    Query(
                        quantile(
                            95,
                            of_model(
                                rate(
                                    "http_server_request_duration_seconds_bucket",
                                    f'{REPLICAS},http_route="/v1/chat/completions"',
                                )
                            ),
                            "replica",
                        ),
                        "{{replica}}",
                    )
                ],
                "Chats as the replica's HTTP server sees them, whole. Far above the engine's whole request: the"
                " server's own process is the bottleneck, so give it a core.",
            ),
            Panel(
                "Scraped in",
                "s",
                [
                    Query(
                        f"max by (replica) ({of_model(f'scrape_duration_seconds{{{REPLICAS}}}')})",
                        "{{replica}}",
                    )
                ],
                "Time that the replica takes to show its metrics. Near 4 s, Prometheus gives up and the graphs get"
                " gaps: the replica's machine is overloaded.",
                warn=1,
                alarm=4,
            ),
        ],
    },
)
