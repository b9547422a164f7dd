"""Exports vLLM's own spans, and those only: FastAPI's would be one for each piece of a stream.

vLLM would set up an exporter itself, but the metrics' OpenTelemetry is there before it, and a process has one.
"""

from __future__ import annotations

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor


class EngineSpans(BatchSpanProcessor):  # type: ignore[misc]  # not here
    """Takes the spans of vLLM's modules; they are sent in batches, and dropped where the store is away."""

    def on_end(self, span: ReadableSpan) -> None:
        """Takes a span that is over."""
        if span.instrumentation_scope and span.instrumentation_scope.name.startswith("vllm"):
            super().on_end(span)


def export() -> None:
    """Begins to export to OTEL_EXPORTER_OTLP_TRACES_ENDPOINT; call it when OpenTelemetry is set up."""
    provider = trace.get_tracer_provider()
    provider.add_span_processor(EngineSpans(OTLPSpanExporter()))  # type: ignore[attr-defined]  # the SDK's has it
