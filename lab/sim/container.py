"""A simulated replica in the replica's image, in place of the launcher: the API on 8000, the metrics on 9464."""

import os
import subprocess
import sys

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
SHAPE = ("--step-ms", "50", "--seq-ms", "0.2", "--max-running", "32", "--load-seconds", "3")


def main() -> None:
    """Becomes the replica. With --print, as `make up` asks, it only says that its settings will do."""
    if "--print" in sys.argv:
        return
    os.environ["PYTHONPATH"] = "/opt/sim"
    sim = [sys.executable, "-m", "lab.sim.replica", "--host", "0.0.0.0", "--model", MODEL, *SHAPE]
    subprocess.Popen([*sim, "--port", "9464"])
    os.execv(sim[0], [*sim, "--port", "8000"])  # noqa: S606 - it gets the signals for this process


if __name__ == "__main__":
    main()
