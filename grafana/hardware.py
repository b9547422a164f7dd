"""Hardware: the host's processors, memory and disks, the containers', and where there are GPUs these first.

The profile `hardware` runs the exporters that it reads. A host without GPUs has no rows for them:
docker-compose.gpu.yml puts the dashboard that has them in the place of the one that does not.
"""

from grafana.panels import REPLICAS, Dashboard, Panel, Query, by, of_model

HOST = 'job="host"'
GPU = 'job="gpus"'
DISKS = f'{HOST},fstype!~"tmpfs|ramfs|overlay|squashfs|iso9660"'
WHOLE_DISKS = f'{HOST},device!~"dm-.*|loop.*|ram.*|sr.*"'
NO_PROFILE = "COMPOSE_PROFILES in .env does not have hardware."
NO_NVLINK = f"{NO_PROFILE[:-1]}, or the GPUs have no NVLink."
WINDOW = "[$__rate_interval]"
FILLED = f"replica_memory_bytes{{{REPLICAS}}} / replica_memory_limit_bytes{{{REPLICAS}}}"
EACH_GPU = "{{Hostname}} {{gpu}}"


def gpu(metric: str, labels: str = GPU, per: str = "") -> list[Query]:
    """A figure of each GPU, in other units where `per` says so (` * 1e6`)."""
    return [Query(f"max by (Hostname, gpu) ({metric}{{{labels}}}){per}", EACH_GPU)]


HOSTS = {
    "Host": [
        Panel(
            "Processors",
            "percentunit",
            [
                Query(
                    f'sum by (instance, mode) (rate(node_cpu_seconds_total{{{HOST},mode!="idle"}}{WINDOW}))'
                    f' / on (instance) group_left count by (instance) (node_cpu_seconds_total{{{HOST},mode="idle"}})',
                    "{{mode}}",
                )
            ],
            "Share of all cores. iowait: the disk is the bottleneck; steal: another machine takes the cores. Near 100"
            " %, first tokens come late, with GPUs too: give the replicas' servers room.",
            stacked=True,
            ceiling=1,
            empty=NO_PROFILE,
        ),
        Panel(
            "Waiting for processors, memory, disks",
            "percentunit",
            [
                Query(f"max by (instance) (rate(node_pressure_{kind}_waiting_seconds_total{{{HOST}}}{WINDOW}))", kind)
                for kind in ("cpu", "memory", "io")
            ],
            "Share of the time in which some process had to wait for it. Above a tenth for long, that is what slows"
            " this host: add it, or move something away.",
            ceiling=1,
            warn=0.1,
            empty=f"{NO_PROFILE[:-1]}, or the kernel does not measure it (psi=1).",
        ),
        Panel(
            "Memory",
            "bytes",
            [
                Query(
                    f"sum(node_memory_MemTotal_bytes{{{HOST}}}) - sum(node_memory_MemAvailable_bytes{{{HOST}}})", "used"
                ),
                Query(f"sum(node_memory_MemTotal_bytes{{{HOST}}})", "there"),
                Query(
                    f"sum(node_memory_SwapTotal_bytes{{{HOST}}}) - sum(node_memory_SwapFree_bytes{{{HOST}}})", "swap"
                ),
            ],
            "Memory that programs hold, of what there is. Near the top a replica is killed (exit status 137): lower"
            " KV_CACHE_GB, or run fewer replicas. Swap in use means that it is too late.",
            empty=NO_PROFILE,
        ),
        Panel(
            "Disks filled",
            "percentunit",
            [
                Query(
                    f"1 - min by (instance, device) (node_filesystem_avail_bytes{{{DISKS}}}"
                    f" / node_filesystem_size_bytes{{{DISKS}}})",
                    "{{device}}",
                )
            ],
            "Share of each file system that is taken. Weights, compiled kernels and metrics lie there: near 100 %,"
            " delete models that nobody serves, or lower PROMETHEUS_MAX_SIZE.",
            ceiling=1,
            warn=0.8,
            alarm=0.9,
            empty=NO_PROFILE,
        ),
        Panel(
            "Disks read and written",
            "Bps",
            [
                Query(
                    f"sum by (device) (rate(node_disk_{what}_bytes_total{{{WHOLE_DISKS}}}{WINDOW}))",
                    f"{{{{device}}}} {what}",
                )
                for what in ("read", "written")
            ],
            "Bytes a second. A replica that starts reads its weights: slow disks make slow starts. If it never ends,"
            " memory is short and files are read again and again.",
            empty=NO_PROFILE,
        ),
        Panel(
            "Clock, off by at most",
            "s",
            [Query(f"max by (instance) (node_timex_maxerror_seconds{{{HOST}}})", "host")],
            "How far the host's clock may be off, as the kernel reckons. It rises while nothing sets it: start a time"
            " service. Tokens of users and certificates end at the wrong time otherwise.",
            warn=1,
            alarm=10,
            empty=NO_PROFILE,
        ),
    ],
    "Containers": [
        Panel(
            "Replicas' processors",
            "short",
            by("replica", of_model(f"rate(replica_cpu_seconds_total{{{REPLICAS}}}{WINDOW})")),
            "Cores that each replica uses, its engine and its server together. On a CPU it is what CPU_THREADS gives."
            " On GPUs one to two are usual; a replica that needs more than there is makes its tokens late.",
        ),
        Panel(
            "Memory, of its limit",
            "percentunit",
            [
                Query(f"max by (replica) ({of_model(f'({FILLED})')})", "{{replica}}"),
                Query('gateway_memory_bytes{job="gateway"} / gateway_memory_limit_bytes{job="gateway"}', "gateway"),
            ],
            "Memory of a container over its limit. At 100 % it is killed (exit status 137): raise REPLICA_MEMORY, or"
            " give the cache less (KV_CACHE_GB).",
            ceiling=1,
            warn=0.8,
            alarm=0.95,
        ),
        Panel(
            "Prometheus",
            "bytes",
            [Query('process_resident_memory_bytes{job="prometheus"}', "memory")],
            "Memory that Prometheus holds, of 1 GiB. It grows with the series (dashboard Gateway): scrape less, or"
            " raise mem_limit in docker-compose.yml.",
            warn=0.8 * 2**30,
            alarm=0.95 * 2**30,
        ),
    ],
}

GPUS = {
    "GPUs": [
        Panel(
            "In use",
            "percent",
            gpu("DCGM_FI_DEV_GPU_UTIL"),
            "Share of the time in which some kernel ran. Near 0 while requests wait: the replica is stuck, or its"
            " processor is the bottleneck.",
            ceiling=100,
            empty=NO_PROFILE,
        ),
        Panel(
            "Memory taken",
            "percentunit",
            [
                Query(
                    f"max by (Hostname, gpu) (DCGM_FI_DEV_FB_USED{{{GPU}}}"
                    f" / (DCGM_FI_DEV_FB_USED{{{GPU}}} + DCGM_FI_DEV_FB_FREE{{{GPU}}}))",
                    EACH_GPU,
                )
            ],
            "vLLM takes GPU_MEMORY_UTILIZATION of it at its start and keeps it. What grows beyond belongs to another"
            " program, and the replica may end: look with nvidia-smi.",
            ceiling=1,
            warn=0.97,
            empty=NO_PROFILE,
        ),
        Panel(
            "Temperature",
            "celsius",
            gpu("DCGM_FI_DEV_GPU_TEMP"),
            "Cards slow down from 85 to 90 °C on. Above 85: look at fans, filters and the room.",
            warn=80,
            alarm=85,
            empty=NO_PROFILE,
        ),
        Panel(
            "Power",
            "watt",
            gpu("DCGM_FI_DEV_POWER_USAGE"),
            "A busy card runs at its limit. Far below it under load: it waits for memory, for its processor or for"
            " other cards.",
            empty=NO_PROFILE,
        ),
        Panel(
            "Clock",
            "hertz",
            gpu("DCGM_FI_DEV_SM_CLOCK", per=" * 1e6"),
            "The clock of the cores. If it falls while the card is busy, heat or power holds it back: see the panel"
            " beside.",
            empty=NO_PROFILE,
        ),
        Panel(
            "Held back",
            "percentunit",
            [
                Query(f"max by (Hostname, gpu) (rate({metric}{{{GPU}}}{WINDOW})) / 1e6", f"{EACH_GPU} {cause}")
                for metric, cause in (
                    ("DCGM_FI_DEV_POWER_VIOLATION", "power"),
                    ("DCGM_FI_DEV_THERMAL_VIOLATION", "heat"),
                )
            ],
            "Share of the time in which the clock was lowered. Power is the usual limit of a busy card; heat is a"
            " fault: look at its cooling.",
            ceiling=1,
            empty=NO_PROFILE,
        ),
        Panel(
            "NVLink",
            "Bps",
            [
                Query(
                    f"max by (Hostname, gpu) (rate(DCGM_FI_DEV_NVLINK_BANDWIDTH_TOTAL{{{GPU}}}{WINDOW})) * 1e6",
                    EACH_GPU,
                )
            ],
            "Bytes a second between cards. 0 while a replica spans several cards (TENSOR_PARALLEL_SIZE): it uses PCIe,"
            " which is slower. See `nvidia-smi topo -m` and NCCL_P2P_DISABLE.",
            empty=NO_NVLINK,
        ),
        Panel(
            "Errors",
            "short",
            [
                Query(f"max by (Hostname, gpu) (DCGM_FI_DEV_XID_ERRORS{{{GPU}}})", f"{EACH_GPU} last XID"),
                Query(
                    f"max by (Hostname, gpu) (DCGM_FI_DEV_ROW_REMAP_FAILURE{{{GPU}}})", f"{EACH_GPU} rows not mapped"
                ),
            ],
            "The number of the last XID, 0 if there was none, and whether faulty memory could not be mapped away."
            " Either: see NVIDIA's table of XIDs; a card that repeats it has to be replaced.",
            alarm=1,
            empty=NO_PROFILE,
        ),
        Panel(
            "Memory errors",
            "short",
            [
                Query(
                    f"max by (Hostname, gpu) (increase(DCGM_FI_DEV_ECC_{kind}_VOL_TOTAL{{{GPU}}}[1h]))",
                    f"{EACH_GPU} {what}",
                )
                for kind, what in (("SBE", "corrected"), ("DBE", "not corrected"))
            ],
            "Errors in the last hour. Corrected ones are harmless while they are few. One that was not corrected ends"
            " what runs there: drain the replica and reset the card.",
            empty=f"{NO_PROFILE[:-1]}, or the cards have no ECC.",
        ),
    ],
}

DESCRIPTION = (
    "The host, its containers, and its GPUs where it has some. COMPOSE_PROFILES=hardware in .env runs the exporters."
)
DASHBOARD = Dashboard(uid="hardware", title="Hardware", description=DESCRIPTION, sections=HOSTS)
WITH_GPUS = Dashboard(
    uid="hardware", title="Hardware", description=DESCRIPTION, sections=GPUS | HOSTS, folder="dashboards-gpu"
)
