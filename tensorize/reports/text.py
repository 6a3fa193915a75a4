"""A report as text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from tensorize.base import printer
from tensorize.reports.data import ReportTotals, SiteReport, share_of

NAME_WIDTH = 24  # a name of this length stands in a table of sites in full
SITE_HEADERS = ("kind", "shape", "format", "parameters", "error", "actual", "why")


def site_table(sites: Sequence[SiteReport], reasons: Sequence[str]) -> str:
    """One short row a site; reasons are numbered, because many sites share one."""
    # A last part that all names share tells nothing, and long names need its room.
    tails = {site.name.rpartition(".")[2] for site in sites}
    tail = f".{tails.pop()}" if len(tails) == 1 and len(sites) > 1 else ""
    if max(len(site.name) for site in sites) <= NAME_WIDTH:
        tail = ""
    rows: list[tuple[str, ...]] = []
    for site in sites:
        dense = site.left
        before, after = map(printer.count, (site.parameters_before, site.parameters_after))
        rows.append(
            (
                site.name.removesuffix(tail),
                site.kind,
                printer.shape_text(site.shape),
                printer.format_text(site.format, site.ranks, site.precision),
                before if dense else f"{before} -> {after}",
                "–" if dense else printer.number(site.predicted_error, 2),
                "–" if dense else printer.number(site.actual_error, 2),
                f"[{reasons.index(site.reason) + 1}]",
            )
        )
    return printer.table(
        (f"site (*{tail})" if tail else "site", *SITE_HEADERS),
        rows,
        align=["left", "end", "keep", "keep", "keep", "right", "right", "right"],
    )


def totals_table(totals: ReportTotals, batch_sizes: Sequence[int]) -> str:
    rows: list[tuple[str, ...]] = []
    for title, name, text in (
        ("parameters", "parameters", printer.count),
        ("bytes", "bytes", printer.bytes_),
    ):
        sides = (totals.before, totals.after, totals.share)
        before, after, share = (getattr(side, name) for side in sides)
        rows.append((title, text(before), text(after), printer.percent(share)))
    what, before, after = totals.counted_flops
    share = printer.percent(share_of(after, before))
    shown = (printer.count(before), printer.count(after), share)
    rows.append((f"FLOPs {printer.each(what)}", *shown))
    if totals.packed:
        held = totals.after.bytes + totals.packed
        share = printer.percent(share_of(held, totals.before.bytes))
        before, after = printer.bytes_(totals.before.bytes), printer.bytes_(held)
        rows.insert(2, ("bytes with packs, once it has run on a CPU", before, after, share))
    times = zip(batch_sizes, totals.before.latency, totals.after.latency, strict=False)
    for count, before, after in times:
        title = f"µs at {count} row{'s' * (count > 1)}, predicted"
        share = printer.percent(share_of(after, before))
        rows.append((title, printer.number(before), printer.number(after), share))
    align: list[printer.Align] = ["left", "right", "right", "right"]
    return printer.table(("total", "before", "after", "share"), rows, align=align)


def named_text(what: str, names: Sequence[str]) -> str:
    """What holds for some weights, with the name of the first."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}: {what}"


def measured_text(value: float | None) -> str:
    return "" if value is None else f"; measured {printer.number(value)}"


def hanging(name: str, text: str) -> str:
    width = printer.prose_width()
    return textwrap.fill(f"{name}: {text}", width, subsequent_indent="  ")


def listing(title: str, items: Sequence[str]) -> Iterator[str]:
    """A titled list, nothing for an empty one."""
    if not items:
        return
    width = printer.prose_width()
    lines = [
        textwrap.fill(i, width, initial_indent="  ", subsequent_indent="      ") for i in items
    ]
    yield "\n".join([title, *lines])
