"""The words that every stage speaks, as frozen records: specs, orders, sites, plans, budgets."""

from tensorize.base.old_names import hand_on

__getattr__ = hand_on(__name__)
