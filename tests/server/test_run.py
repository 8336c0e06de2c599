"""What the process of a server sets while it serves, and restores afterwards."""

import signal
import sys
import types
from typing import Any

import pytest

from grinqh_jax.server import run
from grinqh_jax.server.limits import Limits


def test_a_thread_waits_little_for_pythons_lock_while_the_server_runs(monkeypatch):
    during: list[float] = []

    def serve_nobody(self, sockets):
        during.append(sys.getswitchinterval())

    monkeypatch.setattr(run._Server, "run", serve_nobody)
    monkeypatch.setattr(run, "application", lambda *_, **__: None)
    service: Any = types.SimpleNamespace(limits=Limits(), engine=types.SimpleNamespace(error=None))
    before = sys.getswitchinterval(), signal.getsignal(signal.SIGTERM)
    with run.bind("127.0.0.1", 0) as bound:
        assert run.serve(service, bound)
    assert during == [pytest.approx(run.SWITCH_SECONDS)]
    assert before[0] > run.SWITCH_SECONDS
    assert (sys.getswitchinterval(), signal.getsignal(signal.SIGTERM)) == before
