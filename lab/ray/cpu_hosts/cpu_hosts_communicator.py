"""How the ranks of cpu_hosts.py talk."""

from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator


class Communicator(CpuCommunicator):  # type: ignore[misc]
    """By Gloo alone: two hosts share no memory."""

    def _all_group_ranks_share_shm_group_name(self) -> bool:
        return False
