"""Shows that two trees do the same for users: ``python -m benchmarks.same BASE``.

``__main__`` makes a tree of the commit BASE and runs ``probe`` there and in this working tree, part
by part. The parts are in ``interface``, ``compressed``, ``running`` and ``older``. They know the
public interface only, so that they run in a tree of any inner order; they are copied out of this
one, and import each other relatively.
"""
