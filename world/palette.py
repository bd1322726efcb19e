"""The colours of the world, each of one meaning only, so that probes can tell them apart."""

import numpy as np

Color = tuple[int, int, int]

HAIR: dict[str, Color] = {
    "black": (24, 22, 28),
    "blond": (222, 182, 104),
    "red": (178, 84, 36),
    "white": (250, 250, 240),
    "blue": (84, 142, 255),
}
SHIRT: dict[str, Color] = {
    "red": (226, 24, 48),
    "yellow": (255, 226, 0),
    "navy": (28, 40, 146),
    "purple": (150, 40, 182),
    "orange": (250, 138, 0),
    "pink": (255, 132, 190),
}
SKIN: dict[str, Color] = {"light": (255, 214, 184), "tan": (206, 146, 112), "dark": (112, 70, 62)}
ACCESSORY: dict[str, Color] = {"hat": (0, 154, 160), "glasses": (24, 22, 28), "scarf": (150, 236, 30)}
TROUSERS: Color = (66, 70, 92)
MOUTH: Color = (170, 40, 60)

# Background of each place, from the top to the bottom, then its things.
PLACES: dict[str, dict[str, Color]] = {
    "beach": {"sky": (158, 220, 250), "ground": (240, 222, 168), "thing": (36, 122, 186)},
    "park": {"sky": (196, 232, 244), "ground": (122, 196, 92), "thing": (34, 112, 58)},
    "street": {"sky": (202, 204, 214), "ground": (104, 104, 108), "thing": (168, 118, 110)},
    "room": {"sky": (238, 206, 190), "ground": (146, 104, 76), "thing": (206, 226, 232)},
    "snow": {"sky": (206, 216, 236), "ground": (228, 240, 255), "thing": (30, 84, 78)},
}


def nearest(pixels: np.ndarray, colors: dict[str, Color]) -> np.ndarray:
    """Number of the nearest colour for every pixel.

    Args:
        pixels: (..., 3), 0..255.
        colors: to choose from.

    Returns:
        (...) int, counted in the order of `colors`.
    """
    table = np.array(list(colors.values()), dtype=np.float32)  # (K, 3)
    distances = [np.square(pixels.astype(np.float32) - color).sum(axis=-1) for color in table]
    return np.argmin(np.stack(distances), axis=0)


def all_colors() -> dict[str, Color]:
    """Every colour of the world under a name that says what it means, such as "shirt red" or "place beach sky"."""
    named = {f"hair {name}": color for name, color in HAIR.items()}
    named |= {f"shirt {name}": color for name, color in SHIRT.items()}
    named |= {f"skin {name}": color for name, color in SKIN.items()}
    named |= {f"accessory {name}": color for name, color in ACCESSORY.items() if name != "glasses"}
    named |= {"trousers": TROUSERS}
    for place, parts in PLACES.items():
        named |= {f"place {place} {part}": color for part, color in parts.items()}
    return named
