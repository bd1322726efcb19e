"""Draws scenes with Pillow: pictures, and the frames of clips, of any size.

Lengths are in units of the picture's height, x from the left and y from the top. Pictures are drawn enlarged and scaled
down, so that edges are smooth.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from .palette import ACCESSORY, HAIR, MOUTH, PLACES, SHIRT, SKIN, TROUSERS, Color
from .scene import Person, Scene

ENLARGEMENT = 3
HORIZON = 0.58
FEET = 0.93
HEIGHTS = {"tall": 0.66, "small": 0.5}
ZOOM = 1.5
STEPS = 3  # of a walk
PORTRAIT_ZOOM, PORTRAIT_CENTER = 2.6, 0.4
INK: Color = (24, 22, 28)


@dataclass(frozen=True)
class Camera:
    """Which part of the world a picture shows: (x, y) is at its centre, enlarged `zoom` times."""

    x: float
    y: float
    zoom: float


class Canvas:
    """A picture under the brush, seen through a camera."""

    def __init__(self, width: int, height: int, camera: Camera):
        self.width, self.height, self.camera = width * ENLARGEMENT, height * ENLARGEMENT, camera
        self.image = Image.new("RGB", (self.width, self.height))
        self.brush = ImageDraw.Draw(self.image)

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Pixel of a point."""
        scale = self.height * self.camera.zoom
        return self.width / 2 + (x - self.camera.x) * scale, self.height / 2 + (y - self.camera.y) * scale

    def box(self, x: float, y: float, right: float, bottom: float, color: Color, round_by: float = 0.0) -> None:
        corners = (*self.place(x, y), *self.place(right, bottom))
        self.brush.rounded_rectangle(corners, radius=round_by * self.height * self.camera.zoom, fill=color)

    def oval(self, x: float, y: float, across: float, down: float, color: Color) -> None:
        """An ellipse around (x, y) with these radii."""
        self.brush.ellipse((*self.place(x - across, y - down), *self.place(x + across, y + down)), fill=color)

    def polygon(self, points: list[tuple[float, float]], color: Color) -> None:
        self.brush.polygon([self.place(*point) for point in points], fill=color)

    def line(self, points: list[tuple[float, float]], thick: float, color: Color) -> None:
        """A line with round ends and joints."""
        width = max(1, round(thick * self.height * self.camera.zoom))
        places = [self.place(*point) for point in points]
        self.brush.line(places, fill=color, width=width, joint="curve")
        for x, y in (places[0], places[-1]):
            self.brush.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=color)

    def ring(self, x: float, y: float, radius: float, thick: float, color: Color) -> None:
        corners = (*self.place(x - radius, y - radius), *self.place(x + radius, y + radius))
        self.brush.ellipse(corners, outline=color, width=max(1, round(thick * self.height * self.camera.zoom)))

    def finished(self) -> np.ndarray:
        """The picture (H, W, 3), uint8."""
        size = self.width // ENLARGEMENT, self.height // ENLARGEMENT
        return np.asarray(self.image.resize(size, Image.Resampling.BOX))


def draw(scene: Scene, width: int = 128, height: int = 128, time: float = 0.5) -> np.ndarray:
    """One picture of a scene: (height, width, 3), uint8.

    Args:
        scene: what is shown.
        width, height: of the picture.
        time: 0..1 from the first frame of a clip to the last.
    """
    canvas = Canvas(width, height, camera_at(scene, time, width / height))
    _draw_place(canvas, scene.place)
    for number, person in reversed(list(enumerate(scene.people))):
        _draw_person(canvas, person, _Pose.of(scene, number, time, width / height))
    return canvas.finished()


def draw_clip(scene: Scene, frames: int = 16, width: int = 128, height: int = 128) -> np.ndarray:
    """The frames of a clip: (frames, height, width, 3), uint8."""
    times = [0.5] if frames == 1 else [frame / (frames - 1) for frame in range(frames)]
    return np.stack([draw(scene, width, height, time) for time in times])


def camera_at(scene: Scene, time: float, aspect: float) -> Camera:
    """The camera of a scene at a time of its clip, for pictures of width / height `aspect`."""
    middle = aspect / 2
    if scene.framing == "portrait":
        return Camera(scene.position * aspect, PORTRAIT_CENTER + _shorter(scene.people[0]), PORTRAIT_ZOOM)
    moved = scene.speed * (time - 0.5) * aspect
    if scene.camera == "pan left":
        return Camera(middle - moved, 0.5, 1.0)
    if scene.camera == "pan right":
        return Camera(middle + moved, 0.5, 1.0)
    share = {"zoom in": time, "zoom out": 1 - time}.get(scene.camera)
    return Camera(middle, 0.5 + (0.0 if share is None else 0.06 * share), 1.0 if share is None else ZOOM**share)


def _shorter(person: Person) -> float:
    return HEIGHTS["tall"] - HEIGHTS[person.size]


@dataclass(frozen=True)
class _Pose:
    """Where a person stands, how far the feet are above the ground, the legs' swing and the raised hand's angle."""

    x: float
    lifted: float
    swing: float
    wave: float | None

    @staticmethod
    def of(scene: Scene, number: int, time: float, aspect: float) -> "_Pose":
        if number:
            return _Pose((1 - scene.position) * aspect, 0.0, 0.0, None)
        x, lifted, swing, wave = scene.position * aspect, 0.0, 0.0, None
        if scene.motion.startswith("walk"):
            x += (time - 0.5) * scene.speed * aspect * (-1 if scene.motion == "walk left" else 1)
            swing = math.sin(2 * math.pi * STEPS * time)
        elif scene.motion == "jump":
            lifted = 0.5 * scene.speed * abs(math.sin(2 * math.pi * time))
        elif scene.motion == "wave":
            wave = math.sin(2 * math.pi * 2 * time)
        return _Pose(x, lifted, swing, wave)


def _draw_place(canvas: Canvas, name: str) -> None:
    colors = PLACES[name]
    canvas.box(-4, -4, 6, HORIZON, colors["sky"])
    canvas.box(-4, HORIZON, 6, 5, colors["ground"])
    things = {"beach": _sea, "park": _trees, "street": _houses, "room": _windows, "snow": _firs}
    things[name](canvas, colors["thing"])


def _sea(canvas: Canvas, color: Color) -> None:
    canvas.box(-4, 0.44, 6, HORIZON + 0.04, color)
    for x in (-0.75, 0.05, 0.85, 1.65):  # sails
        canvas.polygon([(x, 0.44), (x + 0.12, 0.44), (x + 0.06, 0.27)], color)


def _trees(canvas: Canvas, color: Color) -> None:
    for x in (-0.7, -0.15, 0.12, 0.9, 1.2, 1.75):
        canvas.oval(x, 0.3, 0.13, 0.16, color)
        canvas.box(x - 0.025, 0.4, x + 0.025, HORIZON + 0.03, color)


def _houses(canvas: Canvas, color: Color) -> None:
    for x, top in ((-0.8, 0.2), (-0.28, 0.3), (0.02, 0.12), (0.74, 0.24), (1.1, 0.14), (1.6, 0.28)):
        canvas.box(x, top, x + 0.24, HORIZON, color)


def _windows(canvas: Canvas, color: Color) -> None:
    for x in (-0.75, 0.06, 0.72, 1.5):
        canvas.box(x, 0.12, x + 0.22, 0.4, color)


def _firs(canvas: Canvas, color: Color) -> None:
    for x, height in ((-0.7, 0.3), (-0.2, 0.4), (0.1, 0.3), (0.84, 0.42), (1.15, 0.3), (1.7, 0.38)):
        canvas.polygon([(x - 0.1, HORIZON + 0.02), (x + 0.1, HORIZON + 0.02), (x, HORIZON - height)], color)


def _draw_person(canvas: Canvas, person: Person, pose: _Pose) -> None:
    tall = HEIGHTS[person.size]
    x, feet = pose.x, FEET - pose.lifted
    head, radius = feet - 0.82 * tall, 0.155 * tall
    shoulders, hips = feet - 0.64 * tall, feet - 0.3 * tall
    hair, shirt, skin = HAIR[person.hair], SHIRT[person.shirt], SKIN[person.skin]
    if person.kind == "woman":
        canvas.box(x - 1.12 * radius, head, x + 1.12 * radius, head + 1.75 * radius, hair, 0.3 * radius)
    for side in (-1, 1):
        hip, foot = x + side * 0.07 * tall, x + side * 0.08 * tall + side * pose.swing * 0.09 * tall
        canvas.line([(hip, hips - 0.02), (foot, feet - 0.03 * tall)], 0.1 * tall, TROUSERS)
    _draw_arms(canvas, person, pose, tall, shoulders)
    canvas.box(x - 0.165 * tall, shoulders, x + 0.165 * tall, hips + 0.03 * tall, shirt, 0.06 * tall)
    canvas.oval(x, head - 0.1 * radius, 1.13 * radius, 1.13 * radius, hair)
    canvas.oval(x, head + 0.18 * radius, 0.86 * radius, 0.88 * radius, skin)
    _draw_face(canvas, person, x, head, radius)


def _draw_arms(canvas: Canvas, person: Person, pose: _Pose, tall: float, shoulders: float) -> None:
    shirt, skin = SHIRT[person.shirt], SKIN[person.skin]
    for side in (-1, 1):
        shoulder = (pose.x + side * 0.15 * tall, shoulders + 0.05 * tall)
        reach = (side * 0.1 - side * pose.swing * 0.06, 0.26)
        if side == 1 and pose.wave is not None:
            reach = (0.17 + 0.1 * pose.wave, -0.24)
        hand = (shoulder[0] + reach[0] * tall, shoulder[1] + reach[1] * tall)
        canvas.line([shoulder, hand], 0.08 * tall, shirt)
        canvas.oval(*hand, 0.05 * tall, 0.05 * tall, skin)


def _draw_face(canvas: Canvas, person: Person, x: float, head: float, radius: float) -> None:
    eyes = head + 0.1 * radius
    for side in (-1, 1):
        canvas.oval(x + side * 0.34 * radius, eyes, 0.1 * radius, 0.13 * radius, INK)
        if person.accessory == "glasses":
            canvas.ring(x + side * 0.36 * radius, eyes, 0.33 * radius, 0.1 * radius, INK)
    canvas.line(
        [(x - 0.25 * radius, head + 0.62 * radius), (x + 0.25 * radius, head + 0.62 * radius)], 0.1 * radius, MOUTH
    )
    color = ACCESSORY.get(person.accessory)
    if person.accessory == "hat":
        canvas.box(x - 1.4 * radius, head - 0.72 * radius, x + 1.4 * radius, head - 0.42 * radius, color, 0.1 * radius)
        canvas.box(x - 0.85 * radius, head - 1.55 * radius, x + 0.85 * radius, head - 0.5 * radius, color, 0.2 * radius)
    elif person.accessory == "scarf":
        canvas.box(x - 0.95 * radius, head + 1.0 * radius, x + 0.95 * radius, head + 1.5 * radius, color, 0.2 * radius)
        canvas.box(x + 0.3 * radius, head + 1.2 * radius, x + 0.75 * radius, head + 2.6 * radius, color, 0.1 * radius)
