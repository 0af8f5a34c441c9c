"""Headless Chromium for the tests of pages; importing this skips a test module where there is none, and says so."""

from __future__ import annotations

import shutil

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("needs a browser: apt-get install chromium", allow_module_level=True)

expect = sync_api.expect
expect.set_options(timeout=20_000)  # milliseconds; a busy machine is no fault
