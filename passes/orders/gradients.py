"""Contraction orders for training: the product, its gradients, and what is saved between them.

Every gradient is a contraction too: of the gradient g at the output with all operands but the one
it is of. So the operands (cores, x, g) are contracted with one of them left out, once for each that
gets a gradient, and once without g for the output. A subset of them has one value, whatever it is
needed for; the question is which subsets to compute, from which parts, to have them all.

Plain autograd answers it by its forward tree alone: it is one of the trees over all operands, g
included, each edge of which is used in both directions. Here the orders are chosen together:

- for every forward tree and every choice of the values to save, each gradient is derived at the
  least cost (a dynamic programme over subsets), values of the others being free; then each anew as
  long as the total falls. Reverse mode on that tree is one start, the gradients one by one another;
- what is not saved is derived again where it is needed, at its cost;
- reverse mode on the trees of the forward plan (plain autograd) is among the candidates. At every
  batch the cheapest is taken of those that save no more than that, and stay within the limit.

With one or two cores every way is tried, and the plan is the best there is. With more the search
over the joint derivations is a local one.
"""

from __future__ import annotations

import itertools
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass
from functools import lru_cache

from tensorize.ir.orders import (
    ContractionPlan,
    TrainingPiece,
    TrainingPlan,
    TrainingStep,
    Tree,
)
from tensorize.ir.spec import TTSpec
from tensorize.passes.orders.by_flops import plan_contraction

Gradients = tuple[int | str, ...]
Line = tuple[int, int]
"""``constant + slope * B``."""
How = dict[int, tuple[int, int]]
"""How values are computed: a subset of the operands from two parts of it. Subsets are bit masks."""

_BATCHES = tuple(16**k for k in range(5))
"""Where candidates are looked for, beside the turns of the forward plan."""

_FAR = 10**9
"""More rows than there are: the end of a piece that has none."""

_MOST_SEARCHED, _MOST_ENUMERATED, _MOST_TREES = 6, 4, 4
"""Cores up to which backward orders are searched (with more, autograd's are taken, and only what is
saved is chosen), and up to which all forward trees are looked at ((2 d - 1)!!, 105 of four cores);
of these so many are searched at a batch, the cheapest in reverse mode."""


@lru_cache(maxsize=4096)
def plan_training(
    spec: TTSpec,
    contract: str = "columns",
    *,
    gradients: Gradients | None = None,
    memory_limit: int | None = None,
    forward: ContractionPlan | None = None,
) -> TrainingPlan:
    """Orders for y = x Wᵀ (or x W), the gradients of x and of the cores, and what to save.

    At no batch does the plan save more elements than plain autograd through the forward plan, or,
    where that is within the limit, cost more FLOPs.

    Args:
        spec: the factorization.
        contract: ``"columns"`` for y = x Wᵀ, ``"rows"`` for y = x W.
        gradients: what gets a gradient, of ``"x"`` and the numbers of the cores (all of them).
        memory_limit: the most elements that may be saved for the backward pass, the input among
            them where it is needed. Where even the least is more, the least is saved: 0 asks for
            that at every batch.
        forward: the orders that y is to be computed in (by predicted time, say); then the plan has
            these trees and these pieces, and more pieces only where a limit begins to bind. None:
            the orders of least FLOPs, and any other where the sum of both passes is less.

    Raises:
        ValueError: ``contract`` is neither side, ``gradients`` names no operand or something else,
            or there are too many cores for the forward plan.
    """
    bound, forward = forward is not None, forward or plan_contraction(spec, contract)
    operands = ("x", *range(len(spec.cores)))
    wanted = operands if gradients is None else gradients
    if not wanted or not set(wanted) <= set(operands):
        raise ValueError(f"gradients are of some of {operands}, got {wanted}")
    wanted = tuple(operand for operand in operands if operand in wanted)
    network = _Network(spec, contract)
    targets = [network.everything ^ network.bit(operand) for operand in wanted]
    naive = {
        piece.first_batch: network.reverse_mode(piece.tree, targets) for piece in forward.pieces
    }
    if bound:
        return TrainingPlan(
            spec, contract, wanted, tuple(network.along(forward, targets, naive, memory_limit))
        )
    found = list(naive.values())
    if network.count <= 2:
        found += network.every_way(targets)
    else:
        for batch in sorted({*_BATCHES, *naive}):
            found += network.candidates(forward.piece(batch).tree, targets, batch)

    def autograd(batch: int) -> _Candidate:
        return naive[forward.piece(batch).first_batch]

    pieces = []
    for first, last, best in _pieces(_undominated(found), naive, memory_limit, autograd):
        pieces.append(network.piece(best, targets, first, last))
    return TrainingPlan(spec, contract, wanted, tuple(pieces))


@dataclass(frozen=True)
class _Candidate:
    """One way to do it all: how both passes compute, what is saved, and both prices as lines."""

    forward: How
    backward: How
    saved: frozenset[int]
    flops: Line
    elements: Line


def _at(line: Line, batch: int) -> int:
    return line[0] + line[1] * batch


def _no_worse(candidate: _Candidate, other: _Candidate, batch: int) -> bool:
    flops = _at(candidate.flops, batch) <= _at(other.flops, batch)
    return flops and _at(candidate.elements, batch) <= _at(other.elements, batch)


def _sum(lines: Iterable[Line]) -> Line:
    constant = slope = 0
    for a, b in lines:
        constant, slope = constant + a, slope + b
    return constant, slope


class _Network:
    """The operands as bits (cores, then x, then g), and what subsets of them cost."""

    def __init__(self, spec: TTSpec, contract: str) -> None:
        self.spec = spec
        self.count = count = len(spec.cores)
        self.x, self.g = 1 << count, 2 << count
        self.everything = (4 << count) - 1
        inner, outer = (spec.columns, spec.rows)
        if contract == "rows":
            inner, outer = outer, inner
        self.orders = [*spec.cores, (*spec.batch, "B", *inner), (*spec.batch, "B", *outer)]
        # One fixed order of all indices; the layout of a value is the emitter's to choose.
        self.names = ("B", *(name for name, _ in spec.sizes))
        self.sizes = (1, *(size for _, size in spec.sizes))
        indices = [sum(1 << self.names.index(name) for name in axes) for axes in self.orders]
        unions = [0] * (self.everything + 1)
        for subset in range(1, self.everything + 1):
            low = subset & -subset
            unions[subset] = unions[subset ^ low] | indices[low.bit_length() - 1]
        self.open = [unions[s] & unions[self.everything ^ s] for s in range(self.everything + 1)]
        for k, own in enumerate(indices):
            self.open[1 << k] = own
        self._splits: dict[int, list[tuple[int, int, Line]]] = {}
        self._lines: dict[tuple[int, int], Line] = {}
        self._trees: list[tuple[Line, How]] | None = None

    def bit(self, operand: int | str) -> int:
        if isinstance(operand, int):
            return 1 << operand
        return self.x if operand == "x" else self.g

    def is_operand(self, subset: int) -> bool:
        return subset & (subset - 1) == 0

    def elements(self, indices: int) -> Line:
        """Elements of a tensor with these indices, as a line in B."""
        product = 1
        for k, size in enumerate(self.sizes):
            if indices >> k & 1:
                product *= size
        return (0, product) if indices & 1 else (product, 0)

    def product(self, left: int, right: int) -> Line:
        """FLOPs of multiplying the values of two subsets."""
        known = self._lines.get((left, right))
        if known is None:
            joint = self.open[left] | self.open[right]
            constant, slope = self.elements(joint)
            twice = 2 if joint & ~self.open[left | right] else 1
            known = self._lines[left, right] = (twice * constant, twice * slope)
        return known

    def splits(self, subset: int) -> list[tuple[int, int, Line]]:
        """Every pair of parts of a subset, once, with what their product costs."""
        if subset not in self._splits:
            found = []
            rest = other = subset & (subset - 1)
            while other:
                found.append((subset ^ other, other, self.product(subset ^ other, other)))
                other = (other - 1) & rest
            self._splits[subset] = found
        return self._splits[subset]

    def flops(self, how: How) -> Line:
        return _sum(self.product(*parts) for parts in how.values())

    # ------------------------------------------------------------------------------ derivations

    def tree_how(self, tree: Tree, how: How) -> int:
        """The products of a contraction tree, into ``how``; the subset that it is of."""
        if not isinstance(tree, tuple):
            return self.bit(tree)
        left, right = self.tree_how(tree[0], how), self.tree_how(tree[1], how)
        how[left | right] = (left, right)
        return left | right

    def forward_trees(self) -> Iterator[How]:
        """All trees over the cores and x."""

        def ways(subset: int) -> Iterator[How]:
            if self.is_operand(subset):
                yield {}
                return
            for left, right, _ in self.splits(subset):
                for a in ways(left):
                    for b in ways(right):
                        yield {**a, **b, subset: (left, right)}

        yield from ways(self.everything ^ self.g)

    def reversed(self, forward: How) -> How:
        """Reverse mode: what is around a part of a tree, from its sibling and what is around both.

        The value around a subset is that of all other operands, g among them.
        """
        around = self.everything
        how: How = {}
        for subset, parts in forward.items():
            for part, sibling in (parts, parts[::-1]):
                how[around ^ part] = (around ^ subset, sibling)
        return how

    def reach(self, how: How, targets: Iterable[int], stop: Collection[int] = ()) -> How:
        """The part of ``how`` that the targets need; what is in ``stop`` is there already."""
        needed: How = {}
        left = [target for target in targets if target not in stop]
        while left:
            subset = left.pop()
            if subset in needed or self.is_operand(subset):
                continue
            needed[subset] = how[subset]
            left += [part for part in how[subset] if part not in stop]
        return needed

    # ------------------------------------------------------------------------------- candidates

    def candidate(self, forward: How, backward: How, saved: Iterable[int]) -> _Candidate:
        """With its prices; of ``saved`` what the backward pass really takes."""
        used = {part for parts in backward.values() for part in parts}
        kept = frozenset(subset for subset in saved if subset in used)
        leaves = [self.x] if self.x in used else []
        elements = _sum(self.elements(self.open[subset]) for subset in (*kept, *leaves))
        flops = _sum((self.flops(forward), self.flops(backward)))
        return _Candidate(forward, backward, kept, flops, elements)

    def inner(self, forward: How) -> list[int]:
        """What could be saved of a forward tree: all of its values but the output."""
        return [subset for subset in forward if subset | self.g != self.everything]

    def reverse_mode(self, tree: Tree, targets: Sequence[int]) -> _Candidate:
        """What plain autograd does after this forward tree."""
        forward: How = {}
        self.tree_how(tree, forward)
        saved = self.inner(forward)
        backward = self.reach(self.reversed(forward), targets, saved)
        return self.candidate(forward, backward, saved)

    def candidates(self, tree: Tree, targets: Sequence[int], batch: int) -> Iterator[_Candidate]:
        """For good forward trees at a batch, and all choices of what is saved, good backwards."""
        own: How = {}
        self.tree_how(tree, own)
        trees = [own]
        if self.count <= _MOST_ENUMERATED:
            if self._trees is None:
                self._trees = [(self._reverse_flops(f, targets), f) for f in self.forward_trees()]
            ranked = sorted(self._trees, key=lambda tree: _at(tree[0], batch))
            trees += [how for _, how in ranked[:_MOST_TREES] if how.keys() != own.keys()]
        search = self.search(targets, batch)
        for forward in trees:
            yield from self.of_tree(forward, targets, search)

    def search(self, targets: Sequence[int], batch: int) -> _Search | None:
        return _Search(self, targets, batch) if self.count <= _MOST_SEARCHED else None

    def of_tree(
        self, forward: How, targets: Sequence[int], search: _Search | None
    ) -> Iterator[_Candidate]:
        """For all choices of what is saved of a forward tree, good backwards."""
        around = self.reversed(forward)
        for saved in _choices(self.inner(forward)):
            start = self.reach({**forward, **around}, targets, saved)
            starts = [start] if search is None else search.backward(start, saved)
            for backward in starts:
                yield self.candidate(forward, backward, saved)

    def along(
        self,
        forward: ContractionPlan,
        targets: Sequence[int],
        naive: Mapping[int, _Candidate],
        limit: int | None,
    ) -> Iterator[TrainingPiece]:
        """The best that can be done in the trees and the pieces of a forward plan."""
        for piece in forward.pieces:
            first, last = piece.first_batch, piece.last_batch
            own = naive[first]
            found = [own, *self.of_tree(own.forward, targets, self.search(targets, first))]
            if limit is None:  # one for the whole piece: no worse at its ends is so between them
                ends = (first, last or _FAR)
                found = [c for c in found if all(_no_worse(c, own, batch) for batch in ends)]
                best = min(found, key=lambda c: (_at(c.flops, first), _at(c.elements, first)))
                yield self.piece(best, targets, first, last)
                continue
            for start, end, best in _pieces(
                _undominated(found), {first: own}, limit, lambda _, own=own: own
            ):
                if (end is None or end >= first) and (last is None or start <= last):
                    known = [batch for batch in (end, last) if batch is not None]
                    yield self.piece(best, targets, max(start, first), min(known, default=None))

    def every_way(self, targets: Sequence[int]) -> Iterator[_Candidate]:
        """All that there are of up to two cores, whose gradients have two products at most."""
        for forward in self.forward_trees():
            for saved in _choices(self.inner(forward)):
                for ways in itertools.product(*(self.splits(target) for target in targets)):
                    backward = {t: (a, b) for t, (a, b, _) in zip(targets, ways, strict=True)}
                    pairs = {part for parts in backward.values() for part in parts} - saved
                    for pair in pairs:
                        if not self.is_operand(pair):
                            ((a, b, _),) = self.splits(pair)
                            backward[pair] = (a, b)
                    yield self.candidate(forward, backward, saved)

    def _reverse_flops(self, forward: How, targets: Sequence[int]) -> Line:
        backward = self.reach(self.reversed(forward), targets, self.inner(forward))
        return _sum((self.flops(forward), self.flops(backward)))

    # ------------------------------------------------------------------------------------ steps

    def piece(
        self, best: _Candidate, targets: Sequence[int], first: int, last: int | None
    ) -> TrainingPiece:
        """A candidate with names for what is saved or used more than once."""
        output = self.everything ^ self.g
        used = [part for parts in best.backward.values() for part in parts]
        several = {s for s in best.backward if used.count(s) > 1}
        named = sorted({*best.saved, *several}, key=lambda s: (s & self.g > 0, s.bit_count(), s))
        names = {subset: f"s{k}" for k, subset in enumerate(named)}
        names[output] = "y"
        for target in targets:
            (k,) = (k for k in range(self.count + 1) if target ^ self.everything == 1 << k)
            names[target] = "dx" if k == self.count else f"d{k}"
        forward = [*(s for s in named if s in best.saved), output]
        backward = [*(s for s in named if s in several), *targets]
        known = frozenset(best.saved)
        return TrainingPiece(
            tuple(self.step(s, best.forward, names, known) for s in forward),
            tuple(self.step(s, best.backward, names, known | several) for s in backward),
            (*(("x",) if self.x in used else ()), *(names[s] for s in forward[:-1])),
            first,
            last,
            *best.flops,
            *best.elements,
        )

    def step(
        self, subset: int, how: How, names: Mapping[int, str], known: Collection[int]
    ) -> TrainingStep:
        def tree(part: int) -> Tree:
            if part != subset and part in known:
                return names[part]
            if self.is_operand(part):
                k = part.bit_length() - 1
                return k if k < self.count else "xg"[k - self.count]
            # What holds x or g first, as in a forward tree.
            left, right = sorted(how[part], key=lambda s: (-(s // self.x), s))
            return tree(left), tree(right)

        axes = tuple(name for k, name in enumerate(self.names) if self.open[subset] >> k & 1)
        if subset | self.g == self.everything:  # the output and the gradients have their own order
            axes = self.orders[-1]
        elif self.is_operand(self.everything ^ subset):
            axes = self.orders[(self.everything ^ subset).bit_length() - 1]
        return TrainingStep(names[subset], tree(subset), axes)


class _Search:
    """Derivations of all targets together, at one batch."""

    def __init__(self, network: _Network, targets: Sequence[int], batch: int) -> None:
        self.network, self.targets, self.batch = network, targets, batch
        composite = [s for s in range(1, network.everything) if not network.is_operand(s)]
        self.prices = {
            subset: [(_at(line, batch), a, b) for a, b, line in network.splits(subset)]
            for subset in composite
        }
        self.parts = {t: [s for s in composite if s & ~t == 0] for t in targets}

    def price(self, how: How) -> int:
        return _at(self.network.flops(how), self.batch)

    def backward(self, start: How, saved: Collection[int]) -> list[How]:
        """Where the search ends from a start, and from the targets derived one by one."""
        one_by_one: How = {}
        for target in self.targets:
            one_by_one |= self.cheapest(target, {*saved, *one_by_one})
        return [self.improved(how, saved) for how in (start, one_by_one)]

    def improved(self, how: How, free: Collection[int]) -> How:
        """Derive one target after the other anew, the others being there, while it pays."""
        price, since, k = self.price(how), 0, 0
        while since < len(self.targets):
            target = self.targets[k]
            rest = [other for other in self.targets if other != target]
            others = self.network.reach(how, rest, free)
            trial = {**others, **self.cheapest(target, {*free, *others})}
            since += 1
            if (cost := self.price(trial)) < price:
                how, price, since = trial, cost, 0
            k = (k + 1) % len(self.targets)
        return how

    def cheapest(self, target: int, free: Collection[int]) -> How:
        """The cheapest derivation of one value, those in ``free`` costing nothing."""
        best = [0] * (self.network.everything + 1)
        how: How = {}
        for subset in self.parts[target]:  # parts of a subset come before it
            if subset not in free:
                least = None
                for price, a, b in self.prices[subset]:
                    price += best[a] + best[b]
                    if least is None or price < least:
                        least, parts = price, (a, b)
                best[subset], how[subset] = least, parts
        return self.network.reach(how, [target], free)


def _choices(inner: Sequence[int]) -> Iterator[frozenset[int]]:
    """What may be saved: all subsets of a few values; of many, those that leave out or hold one."""
    if len(inner) < 4:
        for size in range(len(inner), -1, -1):
            yield from map(frozenset, itertools.combinations(inner, size))
        return
    whole = frozenset(inner)
    yield whole
    for subset in inner:
        yield whole - {subset}
        yield frozenset({subset})
    yield frozenset()


# -------------------------------------------------------------------------------------- the pieces


def _undominated(found: Iterable[_Candidate]) -> list[_Candidate]:
    """Drop candidates to which another is as good, in FLOPs and elements, at every B >= 1."""
    kept: list[tuple[tuple[int, ...], _Candidate]] = []
    figures = [((sum(c.flops), c.flops[1], sum(c.elements), c.elements[1]), c) for c in found]
    for own, candidate in sorted(figures, key=lambda pair: pair[0]):
        if not any(all(a <= b for a, b in zip(o, own, strict=True)) for o, _ in kept):
            kept.append((own, candidate))
    return [candidate for _, candidate in kept]


def _pieces(
    found: Sequence[_Candidate],
    naive: Mapping[int, _Candidate],
    limit: int | None,
    autograd: Callable[[int], _Candidate],
) -> Iterator[tuple[int, int | None, _Candidate]]:
    """The best candidate for every batch, as (first batch, last batch, candidate)."""
    elements = {candidate.elements for candidate in (*found, *naive.values())}
    if limit is not None:
        elements.add((limit, 0))
    turns = {1, *naive, *_meetings({c.flops for c in found}), *_meetings(elements)}

    def price(candidate: _Candidate, batch: int) -> tuple[int, ...]:
        flops, saved = _at(candidate.flops, batch), _at(candidate.elements, batch)
        most = _at(autograd(batch).elements, batch)
        if saved <= (most if limit is None else min(most, limit)):
            return 0, flops, saved, candidate.flops[1]
        return 1, saved, flops, candidate.flops[1]

    starts: list[tuple[int, _Candidate]] = []
    for batch in sorted(turns):
        best = min(found, key=lambda candidate: price(candidate, batch))
        if not starts or best is not starts[-1][1]:
            starts.append((batch, best))
    ends = [*(first - 1 for first, _ in starts[1:]), None]
    for (first, best), last in zip(starts, ends, strict=True):
        yield first, last, best


def _meetings(lines: Collection[Line]) -> set[int]:
    """Batches between which two lines cannot change places."""
    found = set()
    for (a, p), (b, q) in itertools.combinations(lines, 2):
        if p != q:
            found |= {(a - b) // (q - p), (a - b) // (q - p) + 1}
    return {batch for batch in found if batch >= 1}
