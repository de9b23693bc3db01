"""The newest record of a run, for Prometheus to scrape."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_ODD = re.compile(r"[^a-zA-Z0-9_]")


class Prometheus:
    """A sink of `StepMonitor` that serves the newest record at http://host:port/metrics.

    A name such as "l2_norm/grad/group0" becomes the gauge `belief_dist_l2_norm_grad` with the label
    `of="group0"`; texts are left out. The server starts with the first record, and so on rank 0
    alone. Whoever reaches it can read it: by default that is this host.

    Args:
        port: Where it listens; 0 lets the system choose, and `port` tells then.
        host: Address on which it listens; "0.0.0.0" is all of this host's.

    Raises:
        ImportError: prometheus_client is not installed.
    """

    def __init__(self, port: int = 9464, host: str = "127.0.0.1") -> None:
        """See the class."""
        try:
            import prometheus_client
        except ImportError:
            raise ImportError(
                "Prometheus needs prometheus_client: pip install 'belief-dist[prometheus]'."
            ) from None
        self.port = port
        self._host = host
        self._client: Any = prometheus_client
        # One of its own: the default one would add what is known of this process.
        self._registry = prometheus_client.CollectorRegistry()
        self._gauges: dict[str, Any] = {}
        self._served: set[tuple[str, str]] = set()
        self._server: Any = None

    def __call__(self, step: int, values: Mapping[str, Any]) -> None:
        """Serve the record of a step.

        Args:
            step: Its number.
            values: Numbers and texts by name.

        Raises:
            OSError: The port is taken.
        """
        if self._server is None:
            self._server, _ = self._client.start_http_server(
                self.port, addr=self._host, registry=self._registry
            )
            self.port = self._server.server_port
        seen: set[tuple[str, str]] = set()
        for name, value in {"step": step, **values}.items():
            if isinstance(value, (int, float)):
                *first, last = name.split("/")
                key = "_".join(first or [last]), last if first else ""
                self._gauge(key[0]).labels(of=key[1]).set(value)
                seen.add(key)
        for name, label in self._served - seen:  # else they would stay what they were steps ago
            self._gauge(name).remove(label)
        self._served = seen

    def _gauge(self, name: str) -> Any:
        if name not in self._gauges:
            self._gauges[name] = self._client.Gauge(
                f"belief_dist_{_ODD.sub('_', name)}",
                f"{name}, see docs/telemetry.md",
                ["of"],
                registry=self._registry,
            )
        return self._gauges[name]

    def close(self) -> None:
        """Stop the server; another record starts it again."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
