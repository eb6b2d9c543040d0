"""A running server's numbers, read over HTTP."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample


@dataclass(frozen=True)
class Scrape:
    """One answer of ``/metrics``.

    Attributes:
        at: when it was read, in seconds of a monotonic clock.
        samples: all of it, by sample name.
    """

    at: float
    samples: dict[str, list[Sample]]

    def total(self, name: str, **labels: str) -> float:
        """Sum of a sample over engines and whatever labels are not given."""
        return sum(s.value for s in self._matching(name, labels))

    def by_label(self, name: str, label: str) -> dict[str, float]:
        """Sums of a sample by one of its labels."""
        sums: dict[str, float] = {}
        for sample in self._matching(name, {}):
            key = sample.labels[label]
            sums[key] = sums.get(key, 0.0) + sample.value
        return sums

    def labels(self, name: str) -> dict[str, str]:
        """Labels of the first sample of a name; empty where there is none."""
        first = next(self._matching(name, {}), None)
        return dict(first.labels) if first is not None else {}

    def _matching(self, name: str, labels: dict[str, str]) -> Iterator[Sample]:
        for sample in self.samples.get(name, []):
            if labels.items() <= sample.labels.items():
                yield sample


def parse(text: str, at: float) -> Scrape:
    """A scrape from the text that ``/metrics`` answered."""
    samples: dict[str, list[Sample]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append(sample)
    return Scrape(at, samples)


@dataclass(frozen=True)
class ServerAddress:
    """Where a server listens.

    Attributes:
        url: without a path.
        api_key: sent along if there is one.
    """

    url: str
    api_key: str | None = None

    def scrape(self) -> Scrape:
        """Read ``/metrics``.

        Raises:
            ValueError: it is not a server with mixeddim.
            OSError: nothing answers.
        """
        scrape = parse(self._get("/metrics"), time.monotonic())
        if "mixeddim:config_info" not in scrape.samples:
            raise ValueError(
                f"{self.url} has no mixeddim metrics; was it started with --attention-backend "
                "mixeddim?"
            )
        return scrape

    def status(self) -> dict[str, Any] | None:
        """Read ``/mixeddim/status``; None where it is off or the API key is missing."""
        try:
            answer: dict[str, Any] = json.loads(self._get("/mixeddim/status"))
        except urllib.error.HTTPError as error:
            if error.code in (401, 404):
                return None
            raise
        return answer

    def _get(self, path: str) -> str:
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        request = urllib.request.Request(self.url + path, headers=headers)
        with urllib.request.urlopen(request, timeout=30) as reply:
            return str(reply.read().decode())
