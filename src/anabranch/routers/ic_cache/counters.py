"""Counters and gauges, in whatever place the host keeps them; by themselves they write Prometheus' text form."""

import threading

from anabranch.routers.contract.strategy import Metrics

__all__ = ["Counters", "Metrics"]


class Counters:
    """A `Metrics` in memory."""

    def __init__(self) -> None:
        self._values: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
        self._types: dict[str, str] = {}
        self._lock = threading.Lock()

    def count(self, name: str, value: float = 1.0, **labels: str) -> None:
        """Add to a counter."""
        with self._lock:
            self._types[name] = "counter"
            row = self._values.setdefault(name, {})
            key = tuple(sorted(labels.items()))
            row[key] = row.get(key, 0.0) + value

    def gauge(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        with self._lock:
            self._types[name] = "gauge"
            self._values.setdefault(name, {})[tuple(sorted(labels.items()))] = value

    def value(self, name: str, **labels: str) -> float:
        """Of one; 0 if there is none."""
        return self._values.get(name, {}).get(tuple(sorted(labels.items())), 0.0)

    def text(self) -> str:
        """Prometheus' text form, sorted."""
        with self._lock:
            lines: list[str] = []
            for name in sorted(self._values):
                lines.append(f"# TYPE {name} {self._types[name]}")
                for labels, value in sorted(self._values[name].items()):
                    shown = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels)
                    lines.append(f"{name}{{{shown}}} {value:.12g}" if shown else f"{name} {value:.12g}")
            return "\n".join(lines) + "\n" if lines else ""


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
