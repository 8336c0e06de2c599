"""Which GPUs access each other's memory, from a stand-in for the CUDA driver."""

import ctypes

import pytest

from pallas_kernels.exchange import peers


class Driver:
    """Answers like the CUDA driver for four devices, of which the last cannot access the others."""

    def cuInit(self, flags):
        return 0

    def cuDeviceGet(self, handle, ordinal):
        if ordinal > 3:
            return 101  # CUDA_ERROR_INVALID_DEVICE
        handle._obj.value = 10 + ordinal
        return 0

    def cuDeviceCanAccessPeer(self, answer, device, peer):
        assert {device.value, peer.value} <= {10, 11, 12, 13}
        answer._obj.value = device.value != 13
        return 0


@pytest.fixture(autouse=True)
def driver(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())


def test_devices_that_access_each_other():
    assert peers.without_access([0, 1, 2]) is None


def test_the_pair_without_access_is_named():
    assert peers.without_access([0, 3]) == (3, 0)


def test_an_error_of_the_driver_is_an_error():
    with pytest.raises(RuntimeError, match=r"cuDeviceGet\(7\) failed with error 101"):
        peers.without_access([0, 7])
