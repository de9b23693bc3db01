"""What training does from step to step: measured in the shards, written to any sink, drawn.

See docs/telemetry.md. Nothing of it is imported by training itself.
"""

from belief_dist.telemetry.monitor import StepMonitor
from belief_dist.telemetry.prometheus import Prometheus
from belief_dist.telemetry.records import JsonLines, read_records

__all__ = ["JsonLines", "Prometheus", "StepMonitor", "read_records"]
