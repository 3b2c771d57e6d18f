"""A plan as a picture: every physical shard before and after, and what travels between them.

Pure: a plan in, SVG text out. A band is as high as it has bytes, so what is wide is what takes
long; the dashed frame at a bar is where it should end, give or take the tolerance.
"""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from typing import Final
from xml.etree import ElementTree as ET

from rich.filesize import decimal

from shardkit.ops.rebalance.facts import Fill, Plan

__all__ = ["svg"]

# Told apart by people with the usual kinds of colour blindness, on white and on black. Source:
# Okabe and Ito, Color Universal Design, 2008; grey instead of black, and a darker yellow.
_COLOURS: Final = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c8c8c", "#b8a500",
)  # fmt: skip

_WIDTH, _LEFT, _RIGHT, _BAR = 960, 236, 702, 22
_TOP, _GAP, _LEAST, _BYTES = 104, 30, 46, 340
"""Pixels: above the bars, between two, of a slot at least, and of all bytes together."""

_STAYS, _TRAVELS = 0.13, 0.6
"""How opaque bands are."""

_STYLE: Final = """
text { font: 13px system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif; fill: #24292f }
text.title { font-size: 19px; font-weight: 650 } text.quiet { fill: #6e7781 }
text.name { font-weight: 650 } text.off { fill: #c2410c; font-weight: 650 }
text.head { font-size: 12px; letter-spacing: 1.5px; fill: #6e7781 } text.right { text-anchor: end }
.paper { fill: #ffffff } .slot { fill: #24292f; fill-opacity: .05 }
.due { fill: none; stroke: #24292f; stroke-opacity: .6; stroke-dasharray: 3 3 }
@media (prefers-color-scheme: dark) {
text, text.title, text.name { fill: #e6edf3 } text.quiet, text.head { fill: #8d96a0 }
text.off { fill: #ff9e64 } .paper { fill: #0d1117 } .slot { fill: #e6edf3; fill-opacity: .08 }
.due { stroke: #e6edf3 } }
"""


def svg(plan: Plan, *, cluster: str, tolerance: Fraction) -> str:
    """Return the picture of a plan.

    Args:
        plan: what is shown.
        cluster: its name, for the title.
        tolerance: of bytes, as a part of a share.
    """
    return _Picture(plan, cluster, float(tolerance)).text()


class _Picture:
    """The bars and bands of one plan, from top to bottom."""

    def __init__(self, plan: Plan, cluster: str, tolerance: float) -> None:
        self._plan = plan
        self._tolerance = tolerance
        self._names = [fill.physical for fill in plan.before]
        self._sides = [*zip(plan.before, plan.after, strict=True)]
        total = sum(fill.size_bytes for fill in plan.before)
        self._scale = _BYTES / total if total else 0.0
        self._tops: dict[str, float] = {}
        top = float(_TOP)
        for before, after in self._sides:
            self._tops[before.physical] = top
            top += max(self._slot(before, before, after), self._slot(after, before, after)) + _GAP
        height = round(top - _GAP + 34)
        told = _told(plan, total)
        self._root = ET.Element(
            "svg",
            {
                "xmlns": "http://www.w3.org/2000/svg",
                "viewBox": f"0 0 {_WIDTH} {height}",
                "role": "img",
                "aria-label": f"Rebalance of {cluster}: {told}",
            },
        )
        ET.SubElement(self._root, "style").text = _STYLE
        self._rect((0, 0), (_WIDTH, height), kind="paper", rounded=10)
        self._write("title", 28, 38, f"Rebalance of {cluster}")
        self._write("quiet", 28, 60, told)
        self._write("head right", _LEFT + _BAR, _TOP - 14, "BEFORE")
        self._write("head", _RIGHT, _TOP - 14, "AFTER")

    def text(self) -> str:
        """Return the picture as text."""
        flows: Counter[tuple[str, str]] = Counter()
        counts: Counter[tuple[str, str]] = Counter()
        leaves: Counter[str] = Counter()
        for move in self._plan.moves:
            flows[move.source, move.target] += move.size_bytes
            counts[move.source, move.target] += 1
            leaves[move.source] += move.size_bytes
        for before, after in self._sides:
            self._bar(before, before, after, x=_LEFT)
            self._bar(after, before, after, x=_RIGHT)
        left, right = {}, {}
        for before, _ in self._sides:
            name, top = before.physical, self._tops[before.physical]
            stays = self._high(before.size_bytes - leaves[name])
            self._band(name, (top, top), stays, _STAYS)
            left[name] = right[name] = top + stays
        for source in self._names:
            for target in self._names:
                if not counts[source, target]:
                    continue
                high = self._high(flows[source, target])
                told = (
                    f"{source} to {target}: {_count(counts[source, target], 'logical shard')}, "
                    f"{decimal(flows[source, target])}"
                )
                self._band(source, (left[source], right[target]), high, _TRAVELS, told)
                # What has come keeps the colour of where it came from.
                size = (_BAR, high)
                self._rect((_RIGHT, right[target]), size, colour=self._colour(source))
                left[source] += high
                right[target] += high
        return ET.tostring(self._root, encoding="unicode") + "\n"

    def _high(self, size_bytes: float) -> float:
        return size_bytes * self._scale

    def _due(self, before: Fill, after: Fill) -> float:
        """Return how high the bars of a physical shard should be; 0 for one that is drained."""
        for fill in (after, before):
            if fill.size_share:
                return self._high(fill.size_bytes / fill.size_share)
        others = [f.size_bytes / f.size_share for f in self._plan.before if f.size_share]
        # Nothing was there and nothing comes, though something is due: as to the others.
        return self._high(min(others)) if others and not before.size_bytes else 0.0

    def _slot(self, fill: Fill, before: Fill, after: Fill) -> float:
        due = self._due(before, after) * (1 + self._tolerance)
        return max(self._high(fill.size_bytes), due, _LEAST)

    def _colour(self, name: str) -> str:
        return _COLOURS[self._names.index(name) % len(_COLOURS)]

    def _bar(self, fill: Fill, before: Fill, after: Fill, *, x: int) -> None:
        """Draw a bar with where it should end, and what it says beside it."""
        top, due = self._tops[fill.physical], self._due(before, after)
        size = (_BAR, self._high(fill.size_bytes))
        self._rect((x, top), (_BAR, self._slot(fill, before, after)), kind="slot", rounded=3)
        self._rect((x, top), size, colour=self._colour(fill.physical), rounded=3)
        if due:
            margin = due * self._tolerance
            self._rect(
                (x - 5, top + due - margin), (_BAR + 10, max(2 * margin, 1)), kind="due", rounded=2
            )
        is_off = abs(fill.size_share - 1) > self._tolerance if due else bool(fill.size_bytes)
        share = f"{fill.size_share:.0%} of its share"
        if not due:
            share = "to be emptied" if fill.size_bytes else "empty"
        load = "" if fill.load_share is None or not due else f", load {fill.load_share:.0%}"
        at, side = (x - 16, " right") if x == _LEFT else (x + _BAR + 16, "")
        shards = f"{_count(fill.shards, 'shard')} · {decimal(fill.size_bytes)}"
        self._write(f"name{side}", at, top + 12, fill.physical)
        self._write(f"quiet{side}", at, top + 29, shards)
        self._write(f"{'off' if is_off else 'quiet'}{side}", at, top + 46, share + load)

    def _band(
        self, source: str, tops: tuple[float, float], high: float, opacity: float, told: str = ""
    ) -> None:
        """Draw a band from a bar of the left to one of the right."""
        x, middle = _LEFT + _BAR, (_LEFT + _BAR + _RIGHT) / 2
        left, right = tops
        path = (
            f"M{x} {left:.1f}C{middle} {left:.1f} {middle} {right:.1f} {_RIGHT} {right:.1f}"
            f"V{right + high:.1f}C{middle} {right + high:.1f} {middle} {left + high:.1f} "
            f"{x} {left + high:.1f}Z"
        )
        look = {"fill": self._colour(source), "fill-opacity": str(opacity)}
        band = ET.SubElement(self._root, "path", {**look, "d": path})
        if told:
            ET.SubElement(band, "title").text = told

    def _rect(
        self,
        at: tuple[float, float],
        size: tuple[float, float],
        *,
        kind: str = "",
        colour: str = "",
        rounded: int = 0,
    ) -> None:
        look = {"class": kind} if kind else {"fill": colour}
        where = zip(("x", "y", "width", "height"), (*at, *size), strict=True)
        numbers = {key: f"{value:.1f}" for key, value in where} | {"rx": str(rounded)}
        ET.SubElement(self._root, "rect", look | numbers)

    def _write(self, kind: str, x: float, y: float, text: str) -> None:
        where = {"class": kind, "x": f"{x:.1f}", "y": f"{y:.1f}"}
        ET.SubElement(self._root, "text", where).text = text


def _told(plan: Plan, total: int) -> str:
    """Return the plan in one line."""
    if not plan.moves:
        return f"nothing has to move · {decimal(total)}"
    moves = _count(len(plan.moves), "move")
    told = f"{moves} · {decimal(plan.size_bytes)} of {decimal(total)} travel"
    if plan.is_optimal:
        return f"{told} · no plan moves less"
    least = plan.least_bytes
    return told if least is None else f"{told} · any plan moves {decimal(least)} at least"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
