"""Llamas in compressed form in torchtitan's own trainer."""

from tensorize.torchtitan.installed import check_installed

check_installed()

from tensorize.torchtitan.convert import LowRankConverter  # noqa: E402  # it imports torchtitan
from tensorize.torchtitan.flag import low_rank  # noqa: E402

__all__ = ["LowRankConverter", "low_rank"]
