"""The drawn world: scenes follow from their seed, captions say what is in them, probes read it back from pixels."""

import random
from dataclasses import replace

import numpy as np
import pytest
import world_package

world_package.enter()

from world.captions import ATTRIBUTES, describe, describe_person, random_caption
from world.clip_probes import likeness, read_clip, unsteadiness, who
from world.drawing import draw, draw_clip
from world.probes import read_picture
from world.scene import CAMERAS, MOTIONS, Person, Scene, random_person, random_scene

ANA = Person("woman", "red", "navy", "light", "tall", "glasses")
LEO = Person("man", "white", "orange", "dark", "small", "scarf")


def test_a_scene_follows_from_its_seed():
    assert [random_scene(seed, moving=True) for seed in range(8)] == [
        random_scene(seed, moving=True) for seed in range(8)
    ]
    assert len({random_scene(seed) for seed in range(8)}) == 8
    assert np.array_equal(draw(random_scene(3)), draw(random_scene(3)))


@pytest.mark.parametrize("size", [(128, 128), (192, 96), (64, 96)])
def test_pictures_have_any_size(size):
    width, height = size
    scene = Scene((ANA,), "park")
    assert draw(scene, width, height).shape == (height, width, 3)
    assert draw_clip(scene, 3, width, height).shape == (3, height, width, 3)
    assert read_picture(draw(scene, width, height)).place == "park"


def test_probes_read_pictures_back():
    found, right = 0, 0
    for seed in range(80):
        scene = random_scene(seed)
        reading = read_picture(draw(scene))
        answers = [reading.place == scene.place, len(reading.people) == len(scene.people)]
        for seen, person in zip(reading.people, scene.people):
            answers += seen.agrees(person)
        found, right = found + len(answers), right + sum(answers)
    assert found > 400 and right >= 0.99 * found


@pytest.mark.parametrize("motion", MOTIONS)
def test_probes_read_motion_back(motion):
    for seed in range(2):
        scene = random_scene(seed, moving=True, people=1, framing="full", motion=motion, camera="still")
        reading = read_clip(draw_clip(scene, 8))
        assert reading.motion == motion
        if motion.startswith("walk"):
            assert abs(reading.travel) == pytest.approx(scene.speed, abs=0.05)


@pytest.mark.parametrize("camera", CAMERAS)
def test_probes_read_the_camera_back(camera):
    scene = random_scene(5, moving=True, people=1, framing="full", motion="stand", camera=camera)
    assert read_clip(draw_clip(scene, 8)).flow.camera == camera


def test_a_person_is_recognised_among_others():
    cast = (ANA, LEO)
    reading = read_picture(draw(Scene(cast, "street", position=0.3)))
    assert [who(seen, cast) for seen in reading.people] == [0, 1]
    assert reading.people[0].x < 0.5 < reading.people[1].x
    same = read_picture(draw(Scene((ANA,), "beach"))).people[0]
    assert likeness(reading.people[0], same) == 1 and likeness(reading.people[1], same) == 0


def test_noise_between_frames_is_unsteady_and_motion_is_not():
    clip = draw_clip(Scene((ANA,), "room", "walk left", speed=0.1), 8)
    noisy = (clip + np.random.default_rng(0).normal(0, 20, clip.shape)).clip(0, 255)
    assert unsteadiness(clip[:1].repeat(4, axis=0)) == 0
    assert 3 * unsteadiness(clip) < unsteadiness(noisy)


def test_captions_name_what_they_are_told_to():
    assert describe_person(ANA) == "a tall woman with light skin, red hair and a navy shirt, wearing glasses"
    assert describe_person(LEO, ("shirt",)) == "a man with an orange shirt"
    scene = Scene((LEO,), "snow", "jump", "zoom in")
    assert describe(scene, ("hair",)) == "a man with white hair in the snow"
    assert describe(scene, (), moving=True) == "a man jumping up and down in the snow, camera zooms in"
    assert describe(replace(scene, framing="portrait"), ()) == "a portrait of a man in the snow"
    captions = [random_caption(Scene((ANA,), "park"), seed) for seed in range(60)]
    assert captions == [random_caption(Scene((ANA,), "park"), seed) for seed in range(60)]
    assert 0.6 < np.mean(["navy shirt" in caption for caption in captions]) < 0.9
    assert set(ATTRIBUTES) <= {field for field in Person.__dataclass_fields__}


def test_people_differ():
    people = {random_person(random.Random(seed)) for seed in range(50)}
    assert len(people) > 45
    assert random_person(random.Random(0), hair="blue").hair == "blue"
