"""What `--benchmark-json` says about the machine."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.record import record


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--runs", type=int, default=15, help="rounds per comparison of speed")


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    # The plugin's own entries name the host and leave out what the figures depend on.
    machine_info.clear()
    machine_info.update(record())


@pytest.fixture(scope="session")
def runs(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--runs", default=15))  # absent in `pytest .`
