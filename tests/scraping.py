"""One page of metrics as a scraper sees it, read with Prometheus' own parser."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterable

from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

TIMEOUT_S = 20.0


class Page:
    """``values``: of each name and set of labels. Refuses a page that says one thing twice."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.families: list[Metric] = list(text_string_to_metric_families(text))
        self.values: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        for family in self.families:
            for sample in family.samples:
                key = (sample.name, frozenset(sample.labels.items()))
                assert key not in self.values, f"{key} twice"
                self.values[key] = sample.value

    def value(self, name: str, **labels: str) -> float:
        """Of one of ours. KeyError for what the page does not show."""
        return self.values[f"lunashm_{name}", frozenset(labels.items())]

    def labels(self, name: str) -> list[dict[str, str]]:
        """Of all samples of one of ours."""
        return [dict(labels) for found, labels in self.values if found == f"lunashm_{name}"]

    def total(self, name: str) -> float:
        return sum(value for (found, _), value in self.values.items() if found == f"lunashm_{name}")


def scrape(url: str, headers: Iterable[tuple[str, str]] = ()) -> Page:
    return Page(fetch(url, headers))


def fetch(url: str, headers: Iterable[tuple[str, str]] = ()) -> str:
    with urllib.request.urlopen(urllib.request.Request(url, headers=dict(headers)), timeout=TIMEOUT_S) as answer:
        assert answer.status == 200
        text = answer.read().decode()
    assert isinstance(text, str)
    return text
