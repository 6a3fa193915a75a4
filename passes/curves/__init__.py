"""What every rank of every weight loses."""

from tensorize.base.old_names import hand_on

__getattr__ = hand_on(__name__)
