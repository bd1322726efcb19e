"""Captions of scenes, with attributes named or left out, in plain English."""

import random

from .scene import Person, Scene

PLACE_WORDS = {
    "beach": "at the beach",
    "park": "in a park",
    "street": "on a street",
    "room": "in a room",
    "snow": "in the snow",
}
MOTION_WORDS = {
    "stand": "standing",
    "walk left": "walking to the left",
    "walk right": "walking to the right",
    "jump": "jumping up and down",
    "wave": "waving a hand",
}
CAMERA_WORDS = {
    "still": "",
    "pan left": "camera pans left",
    "pan right": "camera pans right",
    "zoom in": "camera zooms in",
    "zoom out": "camera zooms out",
}
ATTRIBUTES = ("size", "skin", "hair", "shirt", "accessory")


def describe_person(person: Person, named: tuple[str, ...] = ATTRIBUTES) -> str:
    """Words for a person, such as "a tall woman with light skin, red hair and a navy shirt, wearing a hat".

    Args:
        person: who is described.
        named: which of `ATTRIBUTES` are said; the others are left open.
    """
    size = f"{person.size} " if "size" in named else ""
    features = []
    if "skin" in named:
        features.append(f"{person.skin} skin")
    if "hair" in named:
        features.append(f"{person.hair} hair")
    if "shirt" in named:
        features.append(f"{_article(person.shirt)} {person.shirt} shirt")
    text = f"a {size}{person.kind}"
    if features:
        text += f" with {_list(features)}"
    if "accessory" in named and person.accessory != "none":
        worn = person.accessory if person.accessory == "glasses" else f"a {person.accessory}"
        text += f", wearing {worn}"
    return text


def describe(scene: Scene, named: tuple[str, ...] = ATTRIBUTES, moving: bool = False) -> str:
    """The caption of a scene.

    Args:
        scene: what is shown.
        named: attributes of people that are said.
        moving: whether the motion of the person and of the camera is said, as for a clip.
    """
    people = " and ".join(describe_person(person, named) for person in scene.people)
    if scene.framing == "portrait":
        people = f"a portrait of {people}"
    doing = MOTION_WORDS[scene.motion] if moving else ""
    parts = [" ".join(filter(None, (people, doing, PLACE_WORDS[scene.place])))]
    if moving and scene.camera != "still":
        parts.append(CAMERA_WORDS[scene.camera])
    return ", ".join(parts)


def random_caption(scene: Scene, seed: int, moving: bool = False) -> str:
    """A caption that leaves each attribute out once in four times."""
    choose = random.Random(f"caption {seed}")
    named = tuple(attribute for attribute in ATTRIBUTES if choose.random() >= 0.25)
    return describe(scene, named, moving)


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _list(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
