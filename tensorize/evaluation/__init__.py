"""How a compressed model compares with the dense one: quality, size, speed."""

from tensorize.base.old_names import hand_on

__getattr__ = hand_on(__name__)
