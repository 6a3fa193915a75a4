"""A browser that shows a page."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


def browse(directory: Path, page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Opens a page in a browser that may use neither the network nor the user's settings."""
    assert CHROMIUM is not None
    quiet = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars "
        "--disable-background-networking --disable-component-update --disable-sync"
    )
    command = [CHROMIUM, *quiet.split(), f"--user-data-dir={directory / 'profile'}"]
    command += ["--enable-logging=stderr", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
