"""Spans that one side has made, and how they hang together."""

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter


class Spans(InMemorySpanExporter):
    """What one side has made, and a provider that sends it here."""

    def __init__(self):
        super().__init__()
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self))

    def named(self, name):
        return [span for span in self.get_finished_spans() if span.name == name]


def below(spans, parent):
    """The spans whose parent is another, by name."""
    found = {}
    for span in spans.get_finished_spans():
        if span.parent is not None and span.parent.span_id == parent.context.span_id:
            found.setdefault(span.name, []).append(span)
    return found
