"""The picture of five key points that ConsisID's models with `is_kps` are conditioned on."""

import math

import numpy as np
import torch
from PIL import Image, ImageDraw

from .pictures import to_image

# One colour per point; each limb, drawn from a point to the nose, has its point's. Source: diffusers,
# pipelines/consisid/pipeline_consisid.py, draw_kps.
COLORS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255))
NOSE = 2
HALF_WIDTH = 4
LIMB_BRIGHTNESS = 0.6
RADIUS = 10


def draw_key_points(points: np.ndarray, width: int, height: int) -> torch.Tensor:
    """Dots joined to the nose by slim ellipses, on black: an IMAGE (1, height, width, 3).

    Args:
        points: (5, 2), x and y in pixels of the picture; what lies outside is not drawn.
    """
    canvas = Image.new("RGB", (width, height))
    brush = ImageDraw.Draw(canvas)
    for index, (point, color) in enumerate(zip(points, COLORS)):
        if index != NOSE:
            brush.polygon(_ellipse(point, points[NOSE]), fill=tuple(int(value * LIMB_BRIGHTNESS) for value in color))
    picture = np.array(canvas)
    rows, columns = np.mgrid[:height, :width]
    for (x, y), color in zip(points, COLORS):
        picture[(columns - int(x)) ** 2 + (rows - int(y)) ** 2 <= RADIUS**2] = color
    return to_image(picture)


def _ellipse(start: np.ndarray, end: np.ndarray) -> list[tuple[int, int]]:
    """Corner points of the ellipse between two points, one per degree, in whole pixels."""
    center = [int(value) for value in (start + end) / 2]
    half_length = int(np.linalg.norm(start - end) / 2)
    tilt = math.radians(int(math.degrees(math.atan2(start[1] - end[1], start[0] - end[0]))))
    turn = np.radians(np.arange(361))
    along, aside = half_length * np.cos(turn), HALF_WIDTH * np.sin(turn)
    x = center[0] + along * math.cos(tilt) - aside * math.sin(tilt)
    y = center[1] + along * math.sin(tilt) + aside * math.cos(tilt)
    return [(round(a), round(b)) for a, b in zip(x, y)]
