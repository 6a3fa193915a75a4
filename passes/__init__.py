"""The compile pipeline, one pass a file: graph and weights in, a plan and cores out.

Order: ``sites`` → ``statistics`` → ``spectra`` → ``predict`` → ``allocate`` → ``factorize``.
``pipeline`` holds what they share, ``preserved`` the loss to preserve, ``order`` the contraction
orders.
"""
