"""Many clients and many requests, shortly: `benchmarks/server_load.py` asks longer, and docs/server.md quotes it."""

from __future__ import annotations

import pytest
import server_load

pytestmark = pytest.mark.slow


def test_health_is_answered_beside_many_clients() -> None:
    statuses, waits = server_load.clients(None, 24, 3)
    assert statuses[200] > 3 and not server_load.failed(statuses) and len(waits) > 2 and max(waits) < 30


def test_requests_leave_nothing_behind() -> None:
    first, *_, last = server_load.leak(None, 64, warm=32)
    assert last["rss"] < 1.2 * first["rss"] and last["kv"] <= server_load.KV and last["files"] <= first["files"] + 2
