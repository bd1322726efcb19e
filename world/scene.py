"""What can be in a picture or a clip, and seeded choices of it."""

import random
from dataclasses import dataclass, replace

from .palette import ACCESSORY, HAIR, PLACES, SHIRT, SKIN

SIZES = ("tall", "small")
KINDS = ("man", "woman")
ACCESSORIES = ("none", *ACCESSORY)
MOTIONS = ("stand", "walk left", "walk right", "jump", "wave")
CAMERAS = ("still", "pan left", "pan right", "zoom in", "zoom out")
FRAMINGS = ("full", "portrait")


@dataclass(frozen=True)
class Person:
    """What one person looks like.

    Args:
        kind: one of `KINDS`; a woman has long hair.
        hair, shirt, skin: keys of `palette.HAIR`, `SHIRT` and `SKIN`.
        size: one of `SIZES`.
        accessory: one of `ACCESSORIES`.
    """

    kind: str
    hair: str
    shirt: str
    skin: str
    size: str = "tall"
    accessory: str = "none"


@dataclass(frozen=True)
class Scene:
    """A picture, or a clip when something in it moves.

    Args:
        people: one or two persons, from left to right.
        place: a key of `palette.PLACES`.
        motion: one of `MOTIONS`; of the first person, while a second one stands.
        camera: one of `CAMERAS`.
        framing: one of `FRAMINGS`; a portrait shows the head and the shoulders of the first person.
        position: 0..1, where the first person is between the left and the right edge, in the middle of the clip.
        speed: share of the width (walk) or of the height (jump) that the person moves through from the first frame to
            the last, or share of the picture that the camera moves over.
    """

    people: tuple[Person, ...]
    place: str
    motion: str = "stand"
    camera: str = "still"
    framing: str = "full"
    position: float = 0.5
    speed: float = 0.4


def random_person(choose: random.Random, **fixed: str) -> Person:
    """A person; `fixed` names attributes that are not chosen."""
    chosen = {
        "kind": choose.choice(KINDS),
        "hair": choose.choice(list(HAIR)),
        "shirt": choose.choice(list(SHIRT)),
        "skin": choose.choice(list(SKIN)),
        "size": choose.choice(SIZES),
        "accessory": choose.choice(ACCESSORIES),
    }
    return Person(**{**chosen, **fixed})


def random_scene(seed: int, moving: bool = False, people: int | None = None, **fixed: object) -> Scene:
    """The scene that follows from a seed.

    Args:
        seed: of all choices.
        moving: whether the person or the camera may move.
        people: 1 or 2; None chooses one in five scenes with two.
        fixed: fields of `Scene` that are not chosen.
    """
    choose = random.Random(f"scene {seed}")
    count = people or (2 if choose.random() < 0.2 else 1)
    first = random_person(choose)
    cast = [first]
    if count == 2:
        others = [shirt for shirt in SHIRT if shirt != first.shirt]
        cast.append(random_person(choose, shirt=choose.choice(others)))
    scene = Scene(
        people=tuple(cast),
        place=choose.choice(list(PLACES)),
        motion=choose.choice(MOTIONS) if moving else "stand",
        camera=choose.choice(CAMERAS) if moving and choose.random() < 0.3 else "still",
        framing="portrait" if count == 1 and choose.random() < 0.2 else "full",
        position=choose.uniform(0.35, 0.65) if count == 1 else choose.uniform(0.22, 0.34),
        speed=choose.uniform(0.25, 0.5),
    )
    scene = replace(scene, **fixed)
    return replace(scene, motion="stand") if scene.framing == "portrait" else scene
