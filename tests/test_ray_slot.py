"""One slot of a Ray cluster, without Ray: what it looks at before it takes a trial."""

import logging
import os
from pathlib import Path

import pytest
from containers import free_port

from search.ray_cluster import for_nodes
from search.ray_slot import Plan, RaySlot
from storage.errors import ObjectStoreError, TrialyardError
from storage.settings import Settings


@pytest.fixture
def plan(home: Path, sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """A slot on the processor that has no study to work on, so that its loop ends at once."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [*logging.getLogger().handlers])  # the slot adds one
    settings = Settings(home=home, storage=sqlite_url, artifacts="s3://bucket/trialyard", patience_seconds=0)
    return Plan(names=(), leave=False, settings=for_nodes(settings), folder=os.getcwd(), marker=None, gpus=0)


def _error(plan: Plan) -> TrialyardError:
    end = RaySlot(plan, 0, []).run()
    assert end.kind == "failed"
    assert end.error is not None
    return end.error


def test_a_slot_whose_node_cannot_use_the_object_store_takes_no_trial(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver may be able to: a node has an environment and packages of its own."""
    for name, value in {"ACCESS_KEY_ID": "a-user", "SECRET_ACCESS_KEY": "the-secret", "REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    error = _error(plan)
    assert isinstance(error, ObjectStoreError)
    assert str(error).startswith("s3://bucket/trialyard cannot be reached")
