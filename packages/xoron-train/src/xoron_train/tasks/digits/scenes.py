"""Scenes: one to three digits and shapes at random places, in random colours and sizes.

A *combination* is what a thing is with its colour, e.g. a red 7. Every sixth combination (one per
digit or shape, two or three per colour) is withheld: it never lies in a scene that is trained on,
though its digit and its colour do.

Shapes: S side of the image in pixels, s side of a thing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from xoron_train.tasks.digits.scans import Scans

IMAGE_SIZE = 64
COLOURS = {
    "red": (240, 60, 60),
    "green": (60, 220, 80),
    "blue": (80, 120, 255),
    "yellow": (240, 220, 50),
    "pink": (250, 110, 225),
    "white": (240, 240, 240),
}
# Of things in training that show what digits and shapes are without saying so by their colour.
GREY = "grey"
SHAPES = ("circle", "square", "triangle")
KINDS = (*(str(digit) for digit in range(10)), *SHAPES)

_SIDES = (22, 28)
_MARGIN = 1
# Centres as far apart as this: no two things are equally far to the left.
_APART = 8
# Share of digits among the things: there are more of them to tell apart than shapes.
_DIGITS = 0.6
_TRIES = 128
_COUNT_WEIGHTS = (0.2, 0.3, 0.5)
_SHADE = 15
_NOISE = 5.0
_GROUND = (0, 30)
# Far from what is called white.
_GREYS = (60, 165)
# Of scans that are trained on: at most as far turned (radians) and slanted, stretched by a factor
# as far from 1, moved by as many of the scan's 8 pixels.
_TURN, _SLANT, _STRETCH, _MOVE = 0.26, 0.25, 0.15, 0.4
_BOLDS = (1.1, 1.8)
# Makes thin strokes as bright as their colour.
_BOLD = 1.4


@dataclass(frozen=True)
class Thing:
    """One digit or shape.

    Attributes:
        kind: of `KINDS`.
        colour: of `COLOURS`, or `GREY`.
        x, y: its left and upper edge in pixels.
        side: of its square, in pixels.
        scan: index of a digit's scan in its side of the split; -1 for a shape.
    """

    kind: str
    colour: str
    x: int
    y: int
    side: int
    scan: int

    @property
    def is_digit(self) -> bool:
        """Whether it is a digit."""
        return self.scan >= 0

    @property
    def center(self) -> float:
        """Of its square, from the left."""
        return self.x + self.side / 2


Scene = tuple[Thing, ...]


def withheld(kind: str, colour: str) -> bool:
    """Whether this combination is kept out of training."""
    return KINDS.index(kind) % len(COLOURS) == list(COLOURS).index(colour)


def draw_scene(
    rng: np.random.Generator, scans: Scans, *, unseen: bool, grey: bool = False
) -> Scene:
    """Draws a scene, its things from left to right.

    Args:
        rng: of this scene alone.
        scans: that its digits are taken from.
        unseen: whether all its things are combinations that are withheld; else none is.
        grey: whether its things have no colour.
    """
    count = int(rng.choice(3, p=_COUNT_WEIGHTS)) + 1
    sides = rng.integers(_SIDES[0], _SIDES[1] + 1, count)
    things = []
    for side, (x, y) in zip(sides, _places(rng, sides), strict=True):
        digit = rng.random() < _DIGITS
        kind = str(rng.integers(10)) if digit else SHAPES[rng.integers(len(SHAPES))]
        allowed = [colour for colour in COLOURS if withheld(kind, colour) == unseen]
        colour = GREY if grey else allowed[rng.integers(len(allowed))]
        scan = int(rng.choice(scans.by_digit[int(kind)])) if digit else -1
        things.append(Thing(kind, colour, int(x), int(y), int(side), scan))
    return tuple(sorted(things, key=lambda thing: thing.center))


def _places(rng: np.random.Generator, sides: np.ndarray) -> np.ndarray:
    """Upper left corners (n, 2) of squares that do not touch, in n columns apart."""
    n = len(sides)
    room = IMAGE_SIZE - _MARGIN - sides[:, None] + 1
    reach = (sides[:, None] + sides) / 2 + 1
    while True:
        corners = rng.integers(_MARGIN, room, (_TRIES, n, 2))
        centers = corners + sides[:, None] / 2
        apart = np.abs(centers[:, :, None] - centers[:, None])
        fine = (apart.max(-1) >= reach) & (apart[..., 0] >= _APART) | np.eye(n, dtype=bool)
        if (good := np.flatnonzero(fine.all((1, 2)))).size:
            return corners[good[0]]


def render(
    scene: Scene, scans: Scans, rng: np.random.Generator, *, varied: bool = False
) -> np.ndarray:
    """The image of a scene on a dark ground with a little noise: (S, S, 3) uint8.

    Args:
        scene: what is there.
        scans: of its digits.
        rng: of this image alone.
        varied: whether digits are varied at random, see `digit_ink`.
    """
    ground = rng.uniform(*_GROUND, 3)
    noise = rng.standard_normal((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.float32)
    image = noise * _NOISE + ground
    for thing in scene:
        grey = thing.colour == GREY
        colour = np.full(3, rng.uniform(*_GREYS)) if grey else np.array(COLOURS[thing.colour])
        colour = colour + rng.uniform(-_SHADE, _SHADE, 3)
        warps = rng if varied else None
        ink = (
            digit_ink(scans.images[thing.scan], thing.side, warps)
            if thing.is_digit
            else _shape(thing.kind, thing.side)
        )
        place = image[thing.y : thing.y + thing.side, thing.x : thing.x + thing.side]
        place += ink[..., None] * (colour - place)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def digit_ink(scan: np.ndarray, side: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """A scan (8, 8) as (s, s): how much of a digit's colour each pixel has, from 0 to 1.

    Args:
        scan: of `scans`.
        side: s.
        rng: turns, slants, stretches and thickens it at random; there are few scans to learn from.
    """
    if rng is not None:
        return np.minimum(1, rng.uniform(*_BOLDS) * _warped(scan, side, rng))
    spread = _spread(side)
    return np.minimum(1, _BOLD * (spread @ scan @ spread.T))


@cache
def _spread(side: int) -> np.ndarray:
    """(s, 8): bilinear interpolation of 8 pixels to s."""
    place = np.clip((np.arange(side) + 0.5) * 8 / side - 0.5, 0, 7)
    return np.clip(1 - np.abs(place[:, None] - np.arange(8)), 0, 1).astype(np.float32)


def _warped(scan: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    """(s, s): a scan (8, 8) under a random affine map, interpolated as `_spread` does."""
    turn, slant = rng.uniform(-_TURN, _TURN), rng.uniform(-_SLANT, _SLANT)
    stretch = 1 + rng.uniform(-_STRETCH, _STRETCH, 2)
    moved = rng.uniform(-_MOVE, _MOVE, 2)
    steps = (np.arange(side) + 0.5) * 8 / side - 4
    y, x = np.meshgrid(steps, steps, indexing="ij")
    across = ((np.cos(turn) * x - np.sin(turn) * y) + slant * y) / stretch[0] + moved[0]
    down = (np.sin(turn) * x + np.cos(turn) * y) / stretch[1] + moved[1]
    padded = np.pad(scan, 1)  # no ink beyond the scan
    u, v = (np.clip(place + 4.5, 0, 8.999) for place in (across, down))
    left, top = u.astype(int), v.astype(int)
    u, v = u - left, v - top
    upper = padded[top, left] * (1 - u) + padded[top, left + 1] * u
    lower = padded[top + 1, left] * (1 - u) + padded[top + 1, left + 1] * u
    return np.asarray(upper * (1 - v) + lower * v)


@cache
def _shape(kind: str, side: int) -> np.ndarray:
    """(s, s): 1 inside of the shape, 0 outside."""
    y, x = np.mgrid[0:side, 0:side] - (side - 1) / 2
    radius = side / 2
    if kind == "circle":
        inside = x**2 + y**2 <= radius**2
    elif kind == "square":
        inside = np.maximum(np.abs(x), np.abs(y)) <= 0.85 * radius
    else:
        inside = np.abs(x) <= (y + radius) / 2
    return inside.astype(np.float32)
