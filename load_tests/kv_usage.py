"""KV-cache use of a server while a run goes, read from its ``/metrics`` page. Pure but for `fetch`.

Our gateway shows ``engine_kv_cache_usage_ratio`` for each of its engines, vLLM its own gauge.
"""

from __future__ import annotations

import re
import urllib.request

GAUGES = ("engine_kv_cache_usage_ratio", "vllm:kv_cache_usage_perc")  # both from 0 to 1
NAMING_LABELS = ("pool", "replica", "engine")
TIMEOUT_S = 2.0

_LINE = re.compile(rf"^({'|'.join(GAUGES)})(?:{{(.*)}})? (\S+)")
_LABEL = re.compile(r'(\w+)="([^"]*)"')


def parse(page: str) -> dict[str, float]:
    """Share of KV blocks in use by engine, from a page in Prometheus' format. An engine is named
    by its pool and replica, or its number."""
    usage = {}
    for line in page.splitlines():
        if match := _LINE.match(line):
            labels = dict(_LABEL.findall(match[2] or ""))
            name = " ".join(labels[label] for label in NAMING_LABELS if label in labels)
            usage[name or "engine"] = float(match[3])
    return usage


def fetch(host: str, headers: dict[str, str]) -> dict[str, float]:
    """What the server at ``host`` shows now; nothing if it shows none or does not answer."""
    request = urllib.request.Request(host + "/metrics", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            return parse(answer.read().decode("utf-8", "replace"))
    except OSError:
        return {}
