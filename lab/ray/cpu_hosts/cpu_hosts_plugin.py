"""A platform of vLLM for a test: the CPUs of several hosts, which Ray takes for GPUs. vLLM's own knows one host's."""


def register() -> str:
    """The class. It lies elsewhere, as vLLM isn't ready to be imported when it asks for the name."""
    return "cpu_hosts.CpuHosts"
