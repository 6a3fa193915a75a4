"""The rise of the loss that a plan will cost."""

from tensorize.base.old_names import hand_on

__getattr__ = hand_on(__name__)
