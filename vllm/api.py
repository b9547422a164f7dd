"""Runs `vllm` with OpenTelemetry in this process only: `python3 api.py serve MODEL …`.

`opentelemetry-instrument` works through PYTHONPATH, which every child inherits: the engine and its workers would each
try to open the metrics port again. Starting the same instrumentation here keeps it in the process that answers HTTP.
Children import this file under another name, so nothing may happen outside the guard below.
"""

from __future__ import annotations

import os
from importlib import import_module

if __name__ == "__main__":
    # First: FastAPI has to be instrumented before vLLM makes its application. A failure stops the replica, as metrics
    # that are silently missing are worse than a clear end.
    import_module("opentelemetry.instrumentation.auto_instrumentation").initialize(swallow_exceptions=False)
    import_module("container").expose()
    if os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        import_module("traces").export()
    import_module("vllm.entrypoints.cli.main").main()
