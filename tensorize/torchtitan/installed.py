"""torchtitan changes its interface with every release: here is the one that is known."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from tensorize.base.errors import TensorizeError

KNOWN = "0.3"
_WAY_OUT = "pip install torchtitan==0.3.0"


def check_installed() -> None:
    """Raises an error where torchtitan is missing or of another release."""
    try:
        found = version("torchtitan")
    except PackageNotFoundError as error:
        raise TensorizeError("torchtitan is not installed", way_out=_WAY_OUT) from error
    if found != KNOWN and not found.startswith(f"{KNOWN}."):
        raise TensorizeError(
            f"torchtitan {found} is installed, and {KNOWN} is the one that is known here",
            way_out=_WAY_OUT,
        )
