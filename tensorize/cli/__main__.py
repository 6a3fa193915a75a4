"""``python -m tensorize.cli``."""

from tensorize.cli import main

main()
