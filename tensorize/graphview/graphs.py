"""The graphs of a model before and after, to read, to compare and to look at."""

from __future__ import annotations

import os
from dataclasses import dataclass

from torch import fx

from tensorize.base import files
from tensorize.base.html import Picture
from tensorize.base.printer import plain
from tensorize.graphview.diff import diff_graphs
from tensorize.graphview.picture import draw
from tensorize.graphview.text import print_graph


@dataclass(frozen=True, eq=False, repr=False)
class Graphs:
    """A model's FX graphs before and after it was rewritten.

    What the texts and the picture say beyond the nodes themselves comes from two entries of
    ``gm.meta``; whoever makes the graphs fills them, and a graph without them is still printed:

    ``"tensorize_names"``: ``dict[str, str]``
        name of a placeholder node → qualified name of the parameter or buffer that it stands for.
        Needed where parameters are lifted to placeholders, as torch.export does.
    ``"tensorize_sites"``: ``dict[str, tuple[str, str, tuple[int, ...], str | None]]``
        name of a node → (site, format, ranks, precision) for every node that computes with a site's
        weight or cores: qualified name of the dense parameter, ``"dense"``, ``"low_rank"``,
        ``"tt"`` or ``"block"``, the inner ranks (empty when dense), and what entries are rounded to
        (None, or nothing in its place, where they are not). Of several connected nodes that belong
        to one site all should be named; views between them need not be.
    """

    before: fx.GraphModule
    after: fx.GraphModule

    def print_readable(self) -> str:
        """Both graphs as stable text: one line a node, with shapes, sites and ranks."""
        before, after = print_graph(self.before), print_graph(self.after)
        return plain(f"before\n{before}\nafter\n{after}")

    def diff(self) -> str:
        """What the rewrite changed, unchanged stretches folded; see ``graph_text.diff_graphs``."""
        return plain(diff_graphs(self.before, self.after))

    def to_svg(self, path: str | os.PathLike[str]) -> None:
        """Draws the graph after, from top to bottom, as one self-contained SVG file.

        A box is a site with all its cores, coloured by format, or a chain of other operations.
        Blocks that repeat with the same structure are drawn once, in a frame marked "× 6"; where
        their ranks differ the box shows the range.

        Raises:
            TensorizeError: the directory of ``path`` does not exist or cannot be written.
        """
        files.write_text(path, draw(self.before, self.after))

    def _repr_html_(self) -> str:
        return Picture(draw(self.before, self.after))._repr_html_()

    def __repr__(self) -> str:
        before, after = len(self.before.graph.nodes), len(self.after.graph.nodes)
        return f"Graphs(before: {before} nodes, after: {after} nodes)"
