"""Draws the demo's pictures: landscapes and patterns from a number, the same every time.

Each scene is composed as SVG, rasterised and grained by the image library, and encoded in the
sizes the service stores. Runs in worker processes of the demo; only ever sees its own drawings.
"""

from __future__ import annotations

import colorsys
import math
import random
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from app.photos import decoder

__all__ = ["SCENES", "draw", "svg_of"]

SHAPES = ((1080, 1080), (1080, 1080), (1080, 1350), (1080, 810))
"""Width and height in pixels: squares, portraits and landscapes."""

GRAIN = 4.0
"""Standard deviation of the film grain, of 255."""

GRAIN_SIDE = 360
"""Pixels of the square of grain that is laid out over the picture; noise is dear to make."""


def draw(seed: int) -> tuple[dict[str, bytes], int, int]:
    """Return the variants of a picture, JPEG only, and the width and height of the largest."""
    import pyvips  # noqa: PLC0415 - loaded in the worker only

    width, height, svg = svg_of(seed)
    picture = pyvips.Image.svgload_buffer(svg.encode()).flatten(background=255)
    across, down = math.ceil(width / GRAIN_SIDE), math.ceil(height / GRAIN_SIDE)
    grain = _grain().replicate(across, down).crop(0, 0, width, height)
    picture = (picture + grain).cast("uchar").copy(interpretation="srgb").copy_memory()
    variants, shape = decoder.encode_variants(picture, ["jpg"])
    return variants, shape["width"], shape["height"]


@cache
def _grain() -> Any:
    import pyvips  # noqa: PLC0415 - loaded in the worker only

    noise = pyvips.Image.gaussnoise(GRAIN_SIDE, GRAIN_SIDE, sigma=GRAIN, mean=0, seed=1)
    return noise.cast("short").copy_memory()


def svg_of(seed: int) -> tuple[int, int, str]:
    """Return width, height and drawing of a picture."""
    rng = random.Random(seed)  # noqa: S311 - a picture, not a secret
    width, height = rng.choice(SHAPES)
    scene = SCENES[seed % len(SCENES)]
    body = scene(rng, width, height)
    head = f'xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
    return width, height, f"<svg {head}>{body}</svg>"


def _color(hue: float, saturation: float, lightness: float) -> str:
    red, green, blue = colorsys.hls_to_rgb(hue % 1, lightness, saturation)
    return f"#{int(red * 255):02x}{int(green * 255):02x}{int(blue * 255):02x}"


def _sky(stops: Sequence[str], name: str = "sky") -> str:
    step = 1 / (len(stops) - 1)
    inner = "".join(
        f'<stop offset="{n * step:.2f}" stop-color="{color}"/>' for n, color in enumerate(stops)
    )
    return (
        f'<linearGradient id="{name}" x1="0" y1="0" x2="0" y2="1">{inner}</linearGradient>'
        f'<rect width="100%" height="100%" fill="url(#{name})"/>'
    )


def _glow(x: float, y: float, radius: float, color: str, name: str = "glow") -> str:
    return (
        f'<radialGradient id="{name}"><stop offset="0" stop-color="{color}" stop-opacity=".9"/>'
        f'<stop offset="1" stop-color="{color}" stop-opacity="0"/></radialGradient>'
        f'<circle cx="{x:.0f}" cy="{y:.0f}" r="{radius * 3:.0f}" fill="url(#{name})"/>'
        f'<circle cx="{x:.0f}" cy="{y:.0f}" r="{radius:.0f}" fill="{color}"/>'
    )


def _ridge(
    rng: random.Random, width: int, height: int, *, base: float, swing: float, rough: int
) -> str:
    """Return the points of a line of hills: a few sine waves above the bottom edge."""
    waves = [
        (rng.uniform(0.5, 1.5) * k, rng.uniform(0, math.tau), swing / k)
        for k in range(1, rough + 1)
    ]
    points = [f"0,{height}"]
    for x in range(0, width + 13, 12):
        y = base + sum(a * math.sin(f * x / width * math.tau + p) for f, p, a in waves)
        points.append(f"{x},{y:.1f}")
    return " ".join([*points, f"{width},{height}"])


def _hills(rng: random.Random, width: int, height: int) -> str:
    hue = rng.choice((0.02, 0.07, 0.55, 0.62, 0.78, 0.92))
    parts = [
        _sky(
            [
                _color(hue + 0.12, 0.55, 0.35),
                _color(hue + 0.04, 0.75, 0.62),
                _color(hue, 0.9, 0.82),
            ]
        ),
        _glow(
            rng.uniform(0.2, 0.8) * width,
            rng.uniform(0.3, 0.48) * height,
            rng.uniform(40, 85),
            _color(hue + 0.03, 1, 0.93),
        ),
    ]
    for layer in range(5):
        base = height * (0.48 + layer * 0.11)
        fill = _color(hue + 0.1 + layer * 0.02, 0.4, 0.55 - layer * 0.1)
        points = _ridge(rng, width, height, base=base, swing=46 - layer * 4, rough=3)
        parts.append(f'<polygon points="{points}" fill="{fill}"/>')
    return "".join(parts)


def _peaks(rng: random.Random, width: int, height: int) -> str:
    hue = rng.uniform(0.52, 0.68)
    parts = [_sky([_color(hue, 0.6, 0.5), _color(hue - 0.04, 0.5, 0.78), _color(0.08, 0.7, 0.88)])]
    for layer in range(3):
        fill = _color(hue, 0.28, 0.62 - layer * 0.17)
        base = height * (0.62 + layer * 0.13)
        for _ in range(4):
            x, tall = rng.uniform(-0.1, 1.1) * width, rng.uniform(0.16, 0.4) * height
            half = tall * rng.uniform(0.8, 1.2)
            top = base - tall
            parts.append(
                f'<polygon points="{x - half:.0f},{height}'
                f" {x - half * 0.5:.0f},{base - tall * 0.4:.0f}"
                f" {x:.0f},{top:.0f} {x + half * 0.55:.0f},{base - tall * 0.35:.0f}"
                f' {x + half:.0f},{height}" fill="{fill}"/>'
            )
            if layer < 2:
                parts.append(
                    f'<polygon points="{x:.0f},{top:.0f} '
                    f"{x - half * 0.16:.0f},{top + tall * 0.2:.0f}"
                    f" {x - half * 0.04:.0f},{top + tall * 0.15:.0f}"
                    f" {x + half * 0.07:.0f},{top + tall * 0.24:.0f}"
                    f' {x + half * 0.18:.0f},{top + tall * 0.2:.0f}" fill="#fff" opacity=".85"/>'
                )
    mist = _color(hue, 0.3, 0.95)
    parts.append(
        f'<linearGradient id="mist" x1="0" y1="0" x2="0" y2="1"><stop offset="0" '
        f'stop-color="{mist}" stop-opacity="0"/><stop offset="1" stop-color="{mist}" '
        f'stop-opacity=".7"/></linearGradient><rect y="60%" width="100%" height="40%" '
        f'fill="url(#mist)"/>'
    )
    return "".join(parts)


def _sea(rng: random.Random, width: int, height: int) -> str:
    hue = rng.choice((0.05, 0.09, 0.5, 0.56, 0.95))
    horizon = height * rng.uniform(0.45, 0.6)
    x = width * rng.uniform(0.3, 0.7)
    sun = _color(hue + 0.02, 1, 0.9)
    parts = [
        _sky([_color(hue + 0.14, 0.5, 0.42), _color(hue + 0.03, 0.85, 0.68)]),
        _glow(x, horizon - rng.uniform(20, 130), rng.uniform(50, 95), sun),
    ]
    water = _color(hue + 0.5, 0.45, 0.3)
    parts.append(f'<rect y="{horizon:.0f}" width="100%" height="100%" fill="{water}"/>')
    for n in range(60):
        depth = (n / 60) ** 1.6
        y = horizon + depth * (height - horizon)
        half = rng.uniform(10, 46) + depth * 260 * rng.random()
        shift = rng.uniform(-30, 30) * (0.4 + depth * 3)
        parts.append(
            f'<ellipse cx="{x + shift:.0f}" cy="{y:.0f}" rx="{half:.0f}" '
            f'ry="{1.5 + depth * 5:.1f}" fill="{sun}" opacity="{0.5 - depth * 0.35:.2f}"/>'
        )
    return "".join(parts)


def _night(rng: random.Random, width: int, height: int) -> str:
    hue = rng.uniform(0.58, 0.75)
    parts = [_sky([_color(hue, 0.7, 0.07), _color(hue - 0.05, 0.6, 0.2), _color(hue, 0.4, 0.4)])]
    for size in (1.6, 2.2, 3.2, 4.8):
        dots = "".join(
            f"M{rng.randrange(width)} {rng.random() ** 1.4 * height * 0.8:.0f}h.1"
            for _ in range(60)
        )
        parts.append(
            f'<path d="{dots}" stroke="#fff" stroke-width="{size}" stroke-linecap="round" '
            f'opacity="{0.4 + size / 9:.2f}"/>'
        )
    aurora = _color(rng.choice((0.36, 0.42, 0.8)), 0.9, 0.6)
    for band in range(3):
        top = height * (0.2 + band * 0.1)
        points = _ridge(rng, width, height, base=top, swing=90, rough=2)
        parts.append(f'<polygon points="{points}" fill="{aurora}" opacity=".10"/>')
    parts.append(
        _glow(width * rng.uniform(0.15, 0.85), height * 0.2, rng.uniform(28, 52), "#fdf6dc")
    )
    ground = _color(hue, 0.5, 0.06)
    points = _ridge(rng, width, height, base=height * 0.86, swing=24, rough=3)
    parts.append(f'<polygon points="{points}" fill="{ground}"/>')
    for _ in range(34):
        x, tall = rng.uniform(0, width), rng.uniform(70, 230)
        foot = height * 0.93
        parts.append(
            f'<polygon points="{x:.0f},{foot - tall:.0f} {x - tall * 0.2:.0f},{foot + 60:.0f} '
            f'{x + tall * 0.2:.0f},{foot + 60:.0f}" fill="{ground}"/>'
        )
    return "".join(parts)


def _city(rng: random.Random, width: int, height: int) -> str:
    hue = rng.choice((0.6, 0.72, 0.85, 0.98))
    parts = [_sky([_color(hue, 0.5, 0.25), _color(hue + 0.1, 0.7, 0.55), _color(0.1, 0.9, 0.75)])]
    for layer in range(3):
        fill = _color(hue, 0.35, 0.34 - layer * 0.12)
        lit: list[str] = []
        x = -20.0
        while x < width:
            wide = rng.uniform(55, 150)
            tall = height * rng.uniform(0.2, 0.58 - layer * 0.1)
            top = height - tall
            parts.append(
                f'<rect x="{x:.0f}" y="{top:.0f}" width="{wide:.0f}" height="{tall:.0f}" '
                f'fill="{fill}"/>'
            )
            if layer:
                lit += [
                    f"M{x + 6 + column * 20:.0f} {top + 10 + row * 30:.0f}h9v13h-9z"
                    for column in range(int(wide // 20))
                    for row in range(int(tall // 30))
                    if rng.random() < 0.3
                ]
            x += wide + rng.uniform(-8, 14)
        parts.append(f'<path d="{"".join(lit)}" fill="#ffd98a" opacity=".8"/>')
    return "".join(parts)


def _bokeh(rng: random.Random, width: int, height: int) -> str:
    hue = rng.random()
    parts = [_sky([_color(hue, 0.6, 0.12), _color(hue + 0.08, 0.6, 0.28)])]
    for _ in range(46):
        radius = rng.uniform(18, 120)
        parts.append(
            f'<circle cx="{rng.randrange(width)}" cy="{rng.randrange(height)}" r="{radius:.0f}" '
            f'fill="{_color(hue + rng.uniform(-0.12, 0.12), 0.9, rng.uniform(0.55, 0.75))}" '
            f'opacity="{rng.uniform(0.12, 0.5):.2f}" stroke="#fff" stroke-opacity=".25"/>'
        )
    return "".join(parts)


def _tiles(rng: random.Random, width: int, height: int) -> str:
    hue = rng.random()
    palette = [
        _color(hue, 0.75, 0.5),
        _color(hue + 0.08, 0.8, 0.65),
        _color(hue + 0.5, 0.6, 0.45),
        _color(hue + 0.55, 0.5, 0.25),
        "#f7efe2",
    ]
    side = width // rng.choice((4, 5, 6))
    parts = [f'<rect width="100%" height="100%" fill="{palette[4]}"/>']
    for y in range(0, height, side):
        for x in range(0, width, side):
            back, front = rng.sample(palette, 2)
            parts.append(f'<rect x="{x}" y="{y}" width="{side}" height="{side}" fill="{back}"/>')
            match rng.randrange(4):
                case 0:
                    shape = f'<circle cx="{x + side / 2}" cy="{y + side / 2}" r="{side * 0.36}"'
                case 1:
                    shape = f'<path d="M{x} {y}h{side}a{side} {side} 0 0 1-{side} {side}z"'
                case 2:
                    shape = f'<path d="M{x} {y + side}v-{side}l{side} {side}z"'
                case _:
                    shape = f'<path d="M{x} {y + side}a{side} {side} 0 0 1 {side}-{side}v{side}z"'
            parts.append(f'{shape} fill="{front}"/>')
    return "".join(parts)


def _dunes(rng: random.Random, width: int, height: int) -> str:
    hue = rng.uniform(0.04, 0.11)
    parts = [
        _sky([_color(hue + 0.5, 0.45, 0.5), _color(hue + 0.04, 0.6, 0.82)]),
        _glow(width * rng.uniform(0.2, 0.8), height * 0.22, 46, "#fffbe8"),
    ]
    for layer in range(4):
        base = height * (0.45 + layer * 0.15)
        points = _ridge(rng, width, height, base=base, swing=70 - layer * 8, rough=2)
        light, dark = (
            _color(hue, 0.72, 0.66 - layer * 0.07),
            _color(hue - 0.02, 0.6, 0.38 - layer * 0.05),
        )
        parts.append(
            f'<linearGradient id="d{layer}" x1="0" y1="0" x2="1" y2=".6"><stop offset="0" '
            f'stop-color="{light}"/><stop offset="1" stop-color="{dark}"/></linearGradient>'
            f'<polygon points="{points}" fill="url(#d{layer})"/>'
        )
    return "".join(parts)


def _leaves(rng: random.Random, width: int, height: int) -> str:
    hue = rng.choice((0.28, 0.36, 0.42, 0.12))
    parts = [_sky([_color(hue, 0.35, 0.92), _color(hue, 0.4, 0.8)])]
    for n in range(38):
        x, y, turn = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0, 360)
        long = rng.uniform(120, 330)
        fill = _color(hue + rng.uniform(-0.05, 0.05), 0.45, 0.68 - n / 38 * 0.45)
        wide = long * 0.26
        parts.append(
            f'<g transform="translate({x:.0f} {y:.0f}) rotate({turn:.0f})"><path d="M0 0'
            f'Q{wide:.0f} {-long / 2:.0f} 0 {-long:.0f}Q{-wide:.0f} {-long / 2:.0f} 0 0z" '
            f'fill="{fill}"/><path d="M0 0V{-long * 0.92:.0f}" stroke="#fff" '
            f'stroke-opacity=".35" stroke-width="2.5"/></g>'
        )
    return "".join(parts)


SCENES: tuple[Callable[[random.Random, int, int], str], ...] = (
    _hills,
    _sea,
    _tiles,
    _night,
    _peaks,
    _bokeh,
    _dunes,
    _city,
    _leaves,
)
"""What there is to draw; a picture's number picks one."""
