"""What cpu_hosts_plugin.py names."""

from vllm.platforms.cpu import CpuPlatform


class CpuHosts(CpuPlatform):  # type: ignore[misc]
    """CPUs that Ray counts as GPUs."""

    ray_device_key = "GPU"

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        """The class by which ranks talk."""
        return "cpu_hosts_communicator.Communicator"
