"""What all tests share."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A shell that starts this in the background has it ignore interrupts, and so would what it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

DEMO = Path(__file__).parent / "data" / "demo-adapters"


@pytest.fixture(scope="session")
def demo_adapters() -> Path:
    """Folder of eight real adapters (rank 16, query and value of six layers, float16)."""
    assert len([p for p in DEMO.iterdir() if p.is_dir()]) == 8
    return DEMO
