"""What passes share: the stages between them, and the observer that runs them.

Order: ``observe`` → ``curves`` → ``predict`` → ``allocate`` → ``rewrite``. ``orders`` finds
contraction orders, ``lowering`` works on the graphs that the backend is given.
"""
