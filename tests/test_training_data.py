"""Training data: annotations, single frames of video files, samples, their batches, and the clips that are skipped."""

import os
import pickle
from collections import Counter

import av
import numpy as np
import pytest
import torch
from tiny_clips import frame_numbers, numbered_frames, write_annotations, write_clip

from consistent_video.models.consisti2v_picture import first_frames
from consistent_video.training.clip_list import ClipList, Source, UnusableClip
from consistent_video.training.clips import ClipDataset, SampleNumbers, SkippedClips, check_usable, loader
from consistent_video.training.randomness import seed_of
from consistent_video.training.video_file import VideoFile

GRAY = ("libx264", "yuv444p", {"crf": "4", "preset": "veryfast"})
OPEN_GOP = ("libx264", "yuv444p", {"crf": "4", "preset": "veryfast", "flags": "-cgop"})
MPEG4 = ("mpeg4", "yuv420p", {"qscale": "1"})
VP8 = ("libvpx", "yuv420p", {"crf": "4", "b": "2M", "auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "realtime"})
GIF = ("gif", "rgb8", {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Videos of 12, 16, 40 and 76 numbered frames, 30x20 pixels, and damaged ones."""
    folder = tmp_path_factory.mktemp("videos")
    for count in (12, 16, 40, 76):
        write_clip(folder / f"{count}.mp4", numbered_frames(count, 20, 30))
    (folder / "text.mp4").write_text("no video", encoding="utf-8")
    noise = torch.rand(40, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    whole = write_clip(folder / "noise.mp4", noise, container={"movflags": "faststart"}).read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    middle = len(whole) // 2
    (folder / "damaged.mp4").write_bytes(whole[:middle] + bytes(9000) + whole[middle + 9000 :])
    return folder


def listed(tmp_path, folder, names, name="annotations.jsonl"):
    rows = [{"text": f"text of {name}", "file": name} for name in names]
    return ClipList([Source(write_annotations(tmp_path / name, rows), folder)])


def dataset_of(clips, **changes):
    arguments = dict(frames=16, width=16, height=16, strides=(1, 5), flip=0.0, crop="center", seed=7) | changes
    return ClipDataset(clips, **arguments)


def same(one, other):
    return (one.number, one.text, one.stride) == (other.number, other.text, other.stride) and torch.equal(
        one.frames, other.frames
    )


def reason(clips, index):
    with pytest.raises(UnusableClip) as caught:
        clips[index]
    return str(caught.value)


# Randomness


def test_seeds_follow_from_all_three():
    assert seed_of(1, 2, "order") == seed_of(1, 2, "order")
    seeds = {
        seed_of(seed, sample, purpose) for seed in (1, 12) for sample in (2, 3, 23) for purpose in ("order", "clip")
    }
    assert len(seeds) == 12
    assert all(0 <= seed < 2**63 for seed in seeds)
    # A run that is continued by a later version has to go on with the same numbers.
    assert seed_of(42, 0, "clip") == 3464386630561983884


# Annotations


def test_a_line_gives_a_file_its_text_and_where_it_is_said(tmp_path, folder):
    rows = [
        {"text": "a boat", "file": "16.mp4", "fps": 8, "time": 2},
        "",
        "   ",
        {"file": "40.mp4", "text": "a \u00e9"},
    ]
    path = write_annotations(tmp_path / "annotations.jsonl", rows)
    clips = ClipList([Source(path, folder)])
    assert len(clips) == 2
    assert (clips[0].path, clips[0].text, clips[0].where) == (folder / "16.mp4", "a boat", f"{path}:1")
    assert (clips[1].text, clips[-1].where) == ("a \u00e9", f"{path}:4")
    with pytest.raises(IndexError):
        clips[2]


def test_a_last_line_may_lack_its_end_and_a_first_one_may_have_a_mark(tmp_path, folder):
    path = tmp_path / "annotations.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a", "file": "16.mp4"}\r\n{"text": "b", "file": "40.mp4"}')
    assert [clip.text for clip in ClipList([Source(path, folder)])] == ["a", "b"]


def test_absolute_paths_are_searched_in_the_folder(tmp_path):
    inside = write_clip(tmp_path / "videos" / "000001_000050" / "1.mp4", numbered_frames(2))
    flat = write_clip(tmp_path / "videos" / "2.mp4", numbered_frames(2))
    names = ["/000001_000050/1.mp4", "/000001_000050/2.mp4", "000001_000050/2.mp4", "/etc/passwd"]
    clips = listed(tmp_path, tmp_path / "videos", names)
    assert (clips[0].path, clips[1].path) == (inside, flat)
    assert "there is no file '000001_000050/2.mp4' in" in reason(clips, 2)
    assert "there is no file '/etc/passwd' in" in reason(clips, 3)


@pytest.mark.parametrize("name", ["../16.mp4", "a/../../16.mp4", "/../16.mp4"])
def test_paths_do_not_leave_the_folder(tmp_path, folder, name):
    (folder / "inner").mkdir(exist_ok=True)
    assert "leads out of the video folder" in reason(listed(tmp_path, folder / "inner", [name]), 0)


def test_captions_may_be_kept_apart(tmp_path, folder):
    rows = [{"id": name, "file": "16.mp4"} for name in ("b", 3, "c", "d")] + [{"file": "16.mp4"}]
    captions = [{"id": "3", "text": "three"}, "", "{broken", {"id": "b", "text": "bee"}, {"id": "b", "text": "later"}]
    captions = write_annotations(
        tmp_path / "captions.jsonl", [*captions, {"id": "d", "title": "no text"}, {"text": "x"}]
    )
    clips = ClipList([Source(write_annotations(tmp_path / "a.jsonl", rows), folder, captions)])
    assert [clips[0].text, clips[1].text] == ["bee", "three"]
    assert reason(clips, 2).endswith("captions.jsonl has no caption for the id 'c'")
    assert reason(clips, 3).startswith(f'{captions}:6: the line has no "text"')
    assert 'no "id"' in reason(clips, 4)


@pytest.mark.parametrize("text", ["\\ud83d", "a boat \\ude00 at sea", "\\udcff"])
def test_a_caption_with_half_a_character_is_skipped_and_listed(tmp_path, folder, text):
    path = tmp_path / "annotations.jsonl"
    rows = [f'{{"file": "16.mp4", "text": "{text}"}}', '{"file": "40.mp4", "text": "a \\ud83d\\ude00"}']
    path.write_text("\n".join(rows), encoding="utf-8")
    clips = ClipList([Source(path, folder)])
    assert "half of a character" in reason(clips, 0)
    assert clips[1].text == "a \U0001f600"
    dataset = dataset_of(clips)
    samples = [dataset[number] for number in range(6)]
    assert {sample.text for sample in samples} == {"a \U0001f600"}
    skipped = SkippedClips(tmp_path / "skipped_clips.txt")
    for sample in samples:
        skipped.add(sample.skipped)
    (line,) = (tmp_path / "skipped_clips.txt").read_text(encoding="utf-8").splitlines()
    assert line.startswith(f"{path}:1\t") and "half of a character" in line


def test_a_separate_caption_with_half_a_character_is_skipped(tmp_path, folder):
    annotations = write_annotations(tmp_path / "annotations.jsonl", [{"id": "a", "file": "16.mp4"}])
    captions = write_annotations(tmp_path / "captions.jsonl", [{"id": "a", "text": "cut \ud83d"}])
    assert "half of a character" in reason(ClipList([Source(annotations, folder, captions)]), 0)


def test_ids_with_one_digest_are_told_apart(tmp_path, folder, monkeypatch):
    monkeypatch.setattr("consistent_video.training.clip_list._digest", lambda identity: len(identity))
    rows = [{"id": name, "file": "16.mp4"} for name in ("aa", "bb", "cc")]
    captions = [{"id": "bb", "text": "b"}, {"id": "x", "text": "x"}, {"id": "aa", "text": "a"}]
    captions = write_annotations(tmp_path / "captions.jsonl", captions)
    clips = ClipList([Source(write_annotations(tmp_path / "a.jsonl", rows), folder, captions)])
    assert [clips[0].text, clips[1].text] == ["a", "b"]
    assert "no caption for the id 'cc'" in reason(clips, 2)


def test_sources_follow_each_other(tmp_path, folder):
    sources = []
    for number, count in enumerate((2, 1, 3)):
        rows = [{"text": f"{number}.{index}", "file": "16.mp4"} for index in range(count)]
        sources.append(Source(write_annotations(tmp_path / f"{number}.jsonl", rows), folder))
    clips = ClipList(sources)
    expected = ["0.0", "0.1", "1.0", "2.0", "2.1", "2.2"]
    assert [clip.text for clip in clips] == expected
    assert [clip.text for clip in pickle.loads(pickle.dumps(clips))] == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("{oops", "the line is not JSON"),
        ("[1, 2]", "should be a JSON object, found list"),
        ("[" * 100000, "the line is not JSON"),
        ({"text": "a"}, 'the line has no "file"; it has text'),
        ({"file": "16.mp4"}, 'the line has no "text"; it has file'),
        ({"file": "16.mp4", "text": None}, '"text" should be text, found None'),
        ({"file": True, "text": "a"}, '"file" should be text, found True'),
        ({"file": "a\0b", "text": "a"}, "there is no file 'a\\x00b'"),
        ({"file": "", "text": "a"}, "there is no file ''"),
        ({"file": "\ud800", "text": "a"}, "there is no file"),
    ],
)
def test_malformed_lines_are_named_when_they_are_read(tmp_path, folder, row, expected):
    path = write_annotations(tmp_path / "annotations.jsonl", [{"text": "a", "file": "16.mp4"}, row])
    clips = ClipList([Source(path, folder)])
    assert clips[0].text == "a"
    assert reason(clips, 1).startswith(f"{path}:2: {expected}" if expected.startswith("the") else f"{path}:2: ")
    assert expected in reason(clips, 1)


def test_missing_and_empty_annotations_are_errors_at_once(tmp_path, folder):
    path = write_annotations(tmp_path / "annotations.jsonl", [{"id": 1, "file": "16.mp4"}])
    empty = write_annotations(tmp_path / "empty.jsonl", ["", "  "])
    with pytest.raises(ValueError, match="nothing to train on"):
        ClipList([])
    with pytest.raises(FileNotFoundError, match="annotation file .*none.jsonl does not exist"):
        ClipList([Source(tmp_path / "none.jsonl", folder)])
    with pytest.raises(FileNotFoundError, match="video folder .*none of .*annotations.jsonl does not exist"):
        ClipList([Source(path, tmp_path / "none")])
    with pytest.raises(FileNotFoundError, match="file of captions .*none.jsonl does not exist"):
        ClipList([Source(path, folder, tmp_path / "none.jsonl")])
    with pytest.raises(ValueError, match="empty.jsonl names no clips"):
        ClipList([Source(empty, folder)])
    with pytest.raises(ValueError, match="empty.jsonl should have lines"):
        ClipList([Source(path, folder, empty)])


# Video files


def test_frames_come_out_as_they_went_in(tmp_path):
    frames = torch.rand(5, 16, 24, 3, generator=torch.Generator().manual_seed(0))
    with VideoFile(write_clip(tmp_path / "clip.mp4", frames)) as video:
        assert video.frames == 5
        found = video.read([3, 0, 3])
    assert found.dtype == torch.uint8
    assert torch.equal(found, (frames[[3, 0, 3]] * 255).round().to(torch.uint8))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("plain.mp4", {}),
        ("b_frames.mp4", dict(codec=GRAY, b_frames=2)),
        ("late.mp4", dict(codec=GRAY, b_frames=2, times=range(100, 160))),
        ("variable.mp4", dict(codec=GRAY, b_frames=2, times=[index * index for index in range(60)])),
        ("open.mp4", dict(codec=OPEN_GOP, b_frames=2)),
        ("short_gop.mp4", dict(codec=GRAY, b_frames=3, gop=4)),
        ("b_frames.mkv", dict(codec=GRAY, b_frames=2)),
        ("b_frames.ts", dict(codec=GRAY, b_frames=2)),
        ("open.ts", dict(codec=OPEN_GOP, b_frames=2)),
        ("b_frames.avi", dict(codec=GRAY, b_frames=2)),
        ("vp8.webm", dict(codec=VP8)),
        ("mpeg4.avi", dict(codec=MPEG4)),
        ("raw.h264", dict(codec=GRAY, b_frames=2)),
        ("animation.gif", dict(codec=GIF)),
    ],
)
def test_frame_numbers_are_exact_in_any_container(tmp_path, name, options):
    path = write_clip(tmp_path / name, numbered_frames(60), **options)
    with VideoFile(path) as video:
        assert video.frames == 60
        everything = video.read(range(60))
        if name != "animation.gif":
            assert frame_numbers(everything) == list(range(60))
        for index in range(60):
            assert torch.equal(video.read([index])[0], everything[index])
        assert torch.equal(video.read([59, 2, 31, 2]), everything[[59, 2, 31, 2]])


@pytest.mark.parametrize("name", ["long.mp4", "long.mkv"])
def test_a_long_video_is_decoded_from_the_key_frame_before(tmp_path, name):
    path = write_clip(tmp_path / name, numbered_frames(120), codec=GRAY, b_frames=2, gop=10)
    with VideoFile(path) as video:
        assert video.frames == 120
        assert video.decoded == 0
        assert frame_numbers(video.read([94, 97])) == [94, 97]
        assert video.decoded <= 20


def test_frames_cut_off_by_an_edit_list_do_not_count(tmp_path):
    untouched = {"avoid_negative_ts": "disabled"}
    path = write_clip(
        tmp_path / "cut.mp4", numbered_frames(60), codec=GRAY, b_frames=2, times=range(-30, 30), container=untouched
    )
    with VideoFile(path) as video:
        assert video.frames == 30
        assert frame_numbers(video.read(range(30))) == list(range(30, 60))
        assert frame_numbers(video.read([11])) == [41]


@pytest.mark.parametrize(("degrees", "turns"), [(90, 1), (180, 2), (-90, 3)])
def test_the_rotation_of_phones_is_applied(tmp_path, degrees, turns):
    frames = torch.rand(3, 16, 24, 3, generator=torch.Generator().manual_seed(0))
    path = write_clip(tmp_path / "turned.mp4", frames, rotation=degrees)
    with VideoFile(path) as video:
        found = video.read([0, 1, 2])
    assert np.array_equal(found.numpy(), np.rot90((frames * 255).round().byte().numpy(), turns, axes=(1, 2)))


def test_files_that_cannot_be_used_say_why(tmp_path, folder):
    def problem(path):
        with pytest.raises(UnusableClip) as caught, VideoFile(path, "list:3") as video:
            video.read(range(video.frames))
        assert caught.value.where == "list:3"
        return caught.value.reason

    assert problem(folder / "none.mp4") == "none.mp4 cannot be read (No such file or directory)"
    assert problem(folder / "text.mp4").startswith("text.mp4 cannot be read (Invalid data")
    assert problem(folder / "cut.mp4").startswith("cut.mp4 announces 40 frames, has ")
    assert problem(folder / "damaged.mp4").startswith("damaged.mp4 ")
    sound = tmp_path / "sound.wav"
    with av.open(str(sound), "w") as file:
        stream = file.add_stream("pcm_s16le", rate=8000, layout="mono")
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        samples.sample_rate = 8000
        file.mux(stream.encode(samples))
    assert problem(sound) == "sound.wav has no video stream that can be decoded"
    with VideoFile(folder / "12.mp4") as video, pytest.raises(UnusableClip, match="has 12 frames, number 12 was asked"):
        video.read([11, 12])


# Samples


def test_samples_are_stretches_at_a_stride(tmp_path, folder):
    dataset = dataset_of(listed(tmp_path, folder, ["76.mp4", "40.mp4", "16.mp4"]))
    found = {name: set() for name in ("76.mp4", "40.mp4", "16.mp4")}
    for number in range(150):
        sample = dataset[number]
        assert sample.number == number
        assert sample.frames.shape == (16, 16, 16, 3) and sample.frames.dtype == torch.float32
        assert sample.skipped == ()
        numbers = frame_numbers(sample.frames)
        assert numbers == list(range(numbers[0], numbers[0] + 15 * sample.stride + 1, sample.stride))
        found[sample.text.removeprefix("text of ")].add((sample.stride, numbers[0], numbers[-1]))
    assert {stride for stride, *_ in found["76.mp4"]} == {1, 2, 3, 4, 5}
    assert (5, 0, 75) in found["76.mp4"]
    assert {stride for stride, *_ in found["40.mp4"]} == {1, 2}
    starts = {start for stride, start, _ in found["40.mp4"] if stride == 2}
    assert {0, 9} <= starts <= set(range(10))
    assert found["16.mp4"] == {(1, 0, 15)}


def test_a_video_too_short_for_the_strides_gets_the_largest_that_fits(tmp_path, folder):
    dataset = dataset_of(listed(tmp_path, folder, ["40.mp4"]), strides=(3, 5))
    assert {dataset[number].stride for number in range(10)} == {2}


def test_every_clip_has_its_turn_in_each_epoch(tmp_path, folder):
    names = ["16.mp4", "40.mp4", "76.mp4", "noise.mp4"]
    dataset = dataset_of(listed(tmp_path, folder, names), frames=2)
    epochs = [[dataset[number].text for number in range(start, start + 4)] for start in range(0, 40, 4)]
    assert len(dataset) == 4
    assert all(sorted(epoch) == sorted(f"text of {name}" for name in names) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 4


def picture_clips(tmp_path, height, width):
    """A clip of 2 noisy frames, its 8-bit values as 0..1, and its list."""
    frames = (torch.rand(2, height, width, 3, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
    write_clip(tmp_path / "picture.mp4", frames)
    return frames, listed(tmp_path, tmp_path, ["picture.mp4"])


@pytest.mark.parametrize("size", [(20, 50), (50, 20), (12, 10)])
def test_centre_crops_are_those_of_first_frames(tmp_path, size):
    frames, clips = picture_clips(tmp_path, *size)
    sample = dataset_of(clips, frames=2, width=16, height=16)[0]
    assert torch.equal(sample.frames, first_frames(frames, 16, 16))


def test_the_share_of_mirrored_samples(tmp_path):
    frames, clips = picture_clips(tmp_path, 16, 16)
    mirrored = Counter()
    dataset = dataset_of(clips, frames=2, flip=0.5)
    for number in range(60):
        found = dataset[number].frames
        assert torch.equal(found, frames) or torch.equal(found, frames.flip(2))
        mirrored[torch.equal(found, frames)] += 1
    assert 18 <= mirrored[True] <= 42
    assert torch.equal(dataset_of(clips, frames=2, flip=1.0)[0].frames, frames.flip(2))
    assert torch.equal(dataset_of(clips, frames=2, flip=0.0)[0].frames, frames)


@pytest.mark.parametrize(("size", "axis"), [((16, 22), 2), ((22, 16), 1)])
def test_random_crops_reach_all_places_and_are_the_same_in_all_frames(tmp_path, size, axis):
    frames, clips = picture_clips(tmp_path, *size)
    dataset = dataset_of(clips, frames=2, crop="random")
    places = [frames.narrow(axis, start, 16) for start in range(7)]
    hits = {[torch.equal(dataset[number].frames, place) for place in places].index(True) for number in range(60)}
    assert hits == set(range(7))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (dict(frames=1), "Samples of 1 frames"),
        (dict(width=0), "of 0x16"),
        (dict(strides=(0, 3)), "Strides \\(0, 3\\)"),
        (dict(strides=(4, 3)), "Strides \\(4, 3\\)"),
        (dict(flip=1.5), "flip is 1.5"),
        (dict(crop="left"), "Unknown crop 'left'"),
    ],
)
def test_settings_out_of_range_are_named(tmp_path, folder, changes, expected):
    with pytest.raises(ValueError, match=expected):
        dataset_of(listed(tmp_path, folder, ["16.mp4"]), **changes)


# Clips that cannot be used


BAD = ["12.mp4", "none.mp4", "cut.mp4", "damaged.mp4", "text.mp4"]


def test_unusable_clips_are_replaced_and_reported_once(tmp_path, folder):
    dataset = dataset_of(listed(tmp_path, folder, ["16.mp4", *BAD, "40.mp4"]), strides=(1, 3))
    samples = [dataset[number] for number in range(70)]
    assert {sample.text.removeprefix("text of ") for sample in samples} == {"16.mp4", "40.mp4", "damaged.mp4"}
    skipped = [problem for sample in samples for problem in sample.skipped]
    lines = sorted(int(problem.where.rpartition(":")[2]) for problem in skipped)
    assert lines == [2, 3, 4, 5, 6]
    assert "12.mp4 has 12 frames, needs 16" in {problem.reason for problem in skipped}
    assert all(problem.__traceback__ is None for problem in skipped)


def test_a_damaged_clip_is_used_where_it_is_whole(tmp_path, folder):
    dataset = dataset_of(
        listed(tmp_path, folder, ["damaged.mp4", "16.mp4"]), frames=4, strides=(1, 1), width=32, height=32
    )
    samples = [dataset[number] for number in range(60)]
    with VideoFile(folder / "noise.mp4") as video:
        whole = video.read(range(40)) / 255
    stretches = {
        start for start in range(37) for sample in samples if torch.equal(sample.frames, whole[start : start + 4])
    }
    assert len(stretches) > 8 and stretches.isdisjoint(range(17, 20))
    assert sum(len(sample.skipped) for sample in samples) == 1


def test_samples_do_not_depend_on_what_was_read_before(tmp_path, folder):
    clips = listed(tmp_path, folder, ["16.mp4", "noise.mp4", *BAD, "40.mp4"])
    used = dataset_of(clips, flip=0.5, crop="random")
    used_samples = {number: used[number] for number in reversed(range(24))}
    for number in range(24):
        assert same(used_samples[number], dataset_of(clips, flip=0.5, crop="random")[number])


def test_a_clip_known_to_be_bad_is_not_opened_again(tmp_path, folder):
    clips = listed(tmp_path, tmp_path, ["short.mp4", "long.mp4"])
    short = write_clip(tmp_path / "short.mp4", numbered_frames(4))
    long = write_clip(tmp_path / "long.mp4", numbered_frames(16))
    dataset = dataset_of(clips)
    assert sum(len(dataset[number].skipped) for number in range(4)) == 1
    short.write_bytes(long.read_bytes())
    assert {dataset[number].text for number in range(10)} == {"text of long.mp4"}


def test_without_one_usable_clip_there_is_nothing_to_train_on(tmp_path, folder):
    clips = listed(tmp_path, folder, ["12.mp4", "none.mp4", "cut.mp4", "text.mp4"])
    with pytest.raises(
        ValueError, match="None of the 4 clips can be used: .*:1: 12.mp4 has 12 frames, needs 16; .*:2: "
    ):
        check_usable(dataset_of(clips))
    assert check_usable(dataset_of(clips, frames=12)) == []
    with pytest.raises(
        ValueError, match="1000 clips drawn in a row for sample 3 cannot be used. The last one: .*jsonl:"
    ):
        dataset_of(clips)[3]


def test_the_check_ends_with_the_first_usable_clip(tmp_path, folder):
    dataset = dataset_of(listed(tmp_path, folder, ["12.mp4", "none.mp4", "16.mp4", "cut.mp4"]))
    assert [problem.where.rpartition(":")[2] for problem in check_usable(dataset)] == ["1", "2"]


def test_a_title_in_an_unknown_encoding_is_of_no_interest(tmp_path):
    path = write_clip(tmp_path / "titled.mp4", numbered_frames(6), title="QQQQQQQQ")
    data = path.read_bytes()
    assert data.count(b"QQQQQQQQ") == 1
    path.write_bytes(data.replace(b"QQQQQQQQ", b"\xff\xfe" * 4))
    with VideoFile(path) as video:
        assert frame_numbers(video.read([0, 5])) == [0, 5]


def test_only_five_reasons_are_listed(tmp_path, folder):
    with pytest.raises(ValueError, match="None of the 7 clips") as caught:
        check_usable(dataset_of(listed(tmp_path, folder, ["none.mp4"] * 7)))
    assert str(caught.value).count("there is no file") == 5
    assert str(caught.value).endswith("; ...")


def test_skipped_clips_are_kept_in_a_file(tmp_path):
    path = tmp_path / "run" / "skipped_clips.txt"
    skipped = SkippedClips(path)
    assert skipped.count == 0 and not path.exists()
    skipped.add(())
    assert not path.exists()
    skipped.add([UnusableClip("a:1", "is\tbroken\n"), UnusableClip("a:2", "is short")])
    skipped.add([UnusableClip("a:1", "is broken")])
    assert path.read_text(encoding="utf-8") == "a:1\tis broken \na:2\tis short\n"
    other = SkippedClips(path)
    other.add([UnusableClip("a:2", "is short"), UnusableClip("b:7", "of \ud800")])
    assert skipped.count == other.count == 3
    skipped.add([UnusableClip("b:7", "of another process"), UnusableClip("b:8", "is new")])
    assert skipped.count == SkippedClips(path).count == 4
    assert len(path.read_text(encoding="utf-8").splitlines()) == 4


# Batches


@pytest.mark.parametrize(("batch_size", "processes"), [(3, 1), (3, 2), (1, 6)])
def test_processes_share_the_samples_of_a_run(batch_size, processes):
    count = 12 // (batch_size * processes)
    samplers = [SampleNumbers(batch_size, processes, rank, 0, count) for rank in range(processes)]
    assert all(len(sampler) == len(list(sampler)) == count for sampler in samplers)
    steps = [sum(batches, []) for batches in zip(*samplers)]
    assert sum(steps, []) == list(range(12))


def test_a_continued_run_goes_on_where_it_ended():
    whole = list(SampleNumbers(2, 3, 1, 0, 7))
    assert whole[:2] == [[2, 3], [8, 9]]
    assert list(SampleNumbers(2, 3, 1, 24, 3)) == whole[4:]
    # on four processes instead of three, the samples from the 25th on are the same ones
    together = sum((sum(SampleNumbers(2, 4, rank, 24, 2), []) for rank in range(4)), [])
    assert sorted(together) == list(range(24, 40))
    for wrong in [(0, 1, 0, 0, 1), (1, 2, 2, 0, 1), (1, 1, 0, -1, 1), (1, 1, 0, 0, -1)]:
        with pytest.raises(ValueError, match="expected samples from 0 up"):
            SampleNumbers(*wrong)


def test_workers_do_not_change_the_samples(tmp_path, folder):
    clips = listed(tmp_path, folder, ["16.mp4", *BAD, "40.mp4", "76.mp4"])
    state = torch.get_rng_state()
    runs = [
        [list(loader(dataset_of(clips, flip=0.5), SampleNumbers(2, processes, rank, 0, 12 // processes), workers))]
        for processes, rank, workers in [(1, 0, 0), (1, 0, 2), (2, 0, 0), (2, 1, 2)]
    ]
    alone, helped, even, odd = (batches for (batches,) in runs)
    assert torch.equal(torch.get_rng_state(), state)
    assert [[sample.number for sample in batch] for batch in alone] == [[n, n + 1] for n in range(0, 24, 2)]
    for one, other in zip(sum(alone, []), sum(helped, [])):
        assert same(one, other)
    together = [batch for pair in zip(even, odd) for batch in pair]
    for one, other in zip(sum(alone, []), sum(together, [])):
        assert same(one, other)
    skipped = SkippedClips(tmp_path / f"skipped.{os.getpid()}.txt")
    for batch in helped:
        for sample in batch:
            skipped.add(sample.skipped)
    assert 1 <= skipped.count <= 5
