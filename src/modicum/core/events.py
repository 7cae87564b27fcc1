"""The log of a run: one JSON line per event, and one progress line on the terminal.

`events.jsonl` holds every event: {"time", "stage", "kind", ...}. `Progress` shows a single line with
the fraction done, the rate, any metrics and the time left; without a terminal it prints a line
every few seconds instead.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, TextIO


class Events:
    """Appends events to a file; each is flushed, so a killed run loses none that were emitted."""

    def __init__(self, path: str | Path | None = None, stage: str = ""):
        self.path, self.stage = (Path(path) if path else None), stage
        self._file: TextIO | None = None

    def emit(self, kind: str, **fields: Any) -> None:
        if self.path is None:
            return
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _drop_torn_line(self.path)
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - stays open for the run
        record = {"time": round(time.time(), 3), "stage": self.stage, "kind": kind} | fields
        self._file.write(json.dumps(record, ensure_ascii=False, default=float) + "\n")
        self._file.flush()

    def progress(self, label: str, total: float | None, unit: str = "") -> Progress:
        return Progress(label, total, unit)


def _drop_torn_line(path: Path) -> None:
    """Truncate a last line that lacks its newline because the process was killed."""
    if not path.exists() or path.stat().st_size == 0:
        return
    data = path.read_bytes()
    if not data.endswith(b"\n"):
        with open(path, "r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)


def read_events(path: str | Path, kind: str | None = None, stage: str | None = None) -> list[dict[str, Any]]:
    """Events of a file in order, optionally of one kind or stage. A torn last line is left out."""
    events = []
    if Path(path).exists():
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            try:
                event = json.loads(line)
            except json.JSONDecodeError:
                continue
            if (kind is None or event["kind"] == kind) and (stage is None or event["stage"] == stage):
                events.append(event)
    return events


def seconds_text(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f}s"
    if seconds < 3600:
        return f"{int(seconds // 60)}m{int(seconds % 60):02d}s"
    return f"{int(seconds // 3600)}h{int(seconds % 3600 // 60):02d}m"


def count_text(value: float) -> str:
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"


class Progress:
    """One line: label, bar, done/total, rate, metrics, time left. Use as a context manager.

    `eta` may be set by the work itself when it knows its deadline better than the rate does.
    """

    def __init__(self, label: str, total: float | None, unit: str = "", stream: TextIO | None = None):
        self.label, self.total, self.unit = label, total, unit
        self.done = 0.0
        self.start = time.monotonic()
        self.metrics: dict[str, Any] = {}
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._last_shown = -1e9
        self._offset = 0.0
        self._written, self._shown_at = "", -1.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._live or not self._written or self.done != self._shown_at:
            self._show(final=True)

    def resume_at(self, done: float) -> None:
        """Start counting from work done by an earlier process; the rate leaves it out."""
        self.done = self._offset = done

    def update(self, amount: float = 1, **metrics: Any) -> None:
        self.done += amount
        self.metrics.update(metrics)
        now = time.monotonic()
        if now - self._last_shown >= (0.2 if self._live else 10.0):
            self._last_shown = now
            self._show()

    def line(self) -> str:
        elapsed = max(time.monotonic() - self.start, 1e-9)
        rate = (self.done - self._offset) / elapsed
        parts = [self.label]
        if self.total:
            fraction = min(self.done / self.total, 1.0)
            parts.append("█" * int(fraction * 20) + "░" * (20 - int(fraction * 20)))
            parts.append(f"{count_text(self.done)}/{count_text(self.total)} {self.unit}".rstrip())
        else:
            parts.append(f"{count_text(self.done)} {self.unit}".rstrip())
        parts.append(f"{count_text(rate)} {self.unit}/s".replace(" /s", "/s"))
        parts += [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in self.metrics.items()]
        if self.total and rate > 0 and self.done < self.total:
            parts.append(f"{seconds_text((self.total - self.done) / rate)} left")
        else:
            parts.append(seconds_text(elapsed))
        return "  ".join(parts)

    def _show(self, final: bool = False) -> None:
        text = self.line()
        if self._live:
            self._stream.write("\r\x1b[K" + text[: _columns()] + ("\n" if final else ""))
        else:
            self._stream.write(text + "\n")
        self._written, self._shown_at = text, self.done
        self._stream.flush()


def _columns() -> int:
    import shutil

    return shutil.get_terminal_size((120, 24)).columns - 1
