"""Tiny checkpoints and the calibration text that the tests of conversions share."""

import pytest


@pytest.fixture(scope="session")
def calib(tmp_path_factory):
    import tiny_models

    return tiny_models.text_file(tmp_path_factory.mktemp("calib") / "calib.txt")


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory):
    import tiny_models

    return tiny_models.write(tmp_path_factory.mktemp("qwen3") / "model")
