"""Samples to train on: stretches of video files at a random stride, mirrored, scaled and cut, and their batches.

A sample follows from the seed and its number alone, so it is the same in any process and after an interruption.
Random strides, mirrored clips, and scaling without antialiasing are those of TIGER-AI-Lab/ConsistI2V.
"""

import random
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from ..models.consisti2v_picture import channels_first, channels_last, cover, first_frames
from .clip_list import Clip, ClipList, UnusableClip
from .randomness import seed_of
from .video_file import VideoFile

CROPS = ("center", "random")
MAX_FAILURES = 1000


@dataclass(frozen=True)
class Sample:
    """One clip to train on.

    Args:
        number: counted over the whole run.
        frames: (F, H, W, 3) float32, 0..1.
        text: what it shows.
        stride: distance between two frames, in frames of the video.
        skipped: the clips that were drawn before and cannot be used, each one once per process.
    """

    number: int
    frames: torch.Tensor
    text: str
    stride: int
    skipped: tuple[UnusableClip, ...]


class ClipDataset(Dataset):
    """`dataset[number]` is the `Sample` with this number, from 0 up without an end.

    Each len(dataset) samples in a row are an epoch, in which each clip has its turn once, in an order of its own. A
    clip that cannot be used is replaced by any other.

    Args:
        clips: to choose from.
        frames: F of a sample, from 2 up.
        width, height: of a sample, in pixels.
        strides: smallest and largest distance between two frames; shorter videos get smaller ones.
        flip: share of the samples that are mirrored horizontally, 0..1.
        crop: one of `CROPS`, the part that is cut out of a video with another aspect ratio.
        seed: of the run.

    Raises:
        ValueError: a value out of its range.
    """

    def __init__(
        self,
        clips: ClipList,
        frames: int,
        width: int,
        height: int,
        strides: tuple[int, int],
        flip: float,
        crop: str,
        seed: int,
    ):
        if frames < 2 or width < 1 or height < 1:
            raise ValueError(f"Samples of {frames} frames of {width}x{height}: expected 2 frames and 1x1 at least.")
        if not 1 <= strides[0] <= strides[1]:
            raise ValueError(f"Strides {tuple(strides)}: expected two numbers from 1 up, the smaller one first.")
        if not 0 <= flip <= 1:
            raise ValueError(f"flip is {flip}; expected a share from 0 to 1.")
        if crop not in CROPS:
            raise ValueError(f"Unknown crop {crop!r}. Choose one of: {', '.join(CROPS)}.")
        self.clips, self.frames, self.width, self.height = clips, frames, width, height
        self.strides, self.flip, self.crop, self.seed = strides, flip, crop, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)
        self._unusable: set[int] = set()
        self._reported: dict[int, UnusableClip] = {}

    def __len__(self) -> int:
        """Samples of an epoch."""
        return len(self.clips)

    def __getitem__(self, number: int) -> Sample:
        """The sample with this number.

        Raises:
            ValueError: `MAX_FAILURES` clips in a row cannot be used.
        """
        choices = random.Random(seed_of(self.seed, number, "clip"))
        skipped = []
        for index in islice(self._indices(number, choices), MAX_FAILURES):
            if index in self._unusable:
                continue
            try:
                frames, text, stride = self._cut(index, choices)
            except UnusableClip as problem:
                if index not in self._reported:
                    # Without the traceback, which would keep the decoder alive.
                    self._reported[index] = UnusableClip(problem.where, problem.reason)
                    skipped.append(self._reported[index])
            else:
                return Sample(number, frames, text, stride, tuple(skipped))
        raise ValueError(
            f"{MAX_FAILURES} clips drawn in a row for sample {number} cannot be used. The last one: "
            f"{self._reported[index]}. Correct the annotations or the video files."
        )

    def _indices(self, number: int, choices: random.Random) -> Iterator[int]:
        """The clip whose turn it is, then random ones."""
        epoch, position = divmod(number, len(self.clips))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(seed_of(self.seed, epoch, "order"))
            self._epoch, self._order = epoch, torch.randperm(len(self.clips), generator=generator)
        yield int(self._order[position])
        while True:
            yield choices.randrange(len(self.clips))

    def _cut(self, index: int, choices: random.Random) -> tuple[torch.Tensor, str, int]:
        """Frames (F, H, W, 3), text and stride of a sample of a clip."""
        try:
            clip, video = _open(self.clips, index, self.frames)
        except UnusableClip:
            # Only what does not depend on the wanted frames is remembered: samples must not depend on earlier ones.
            self._unusable.add(index)
            raise
        with video:
            fitting = (video.frames - 1) // (self.frames - 1)
            stride = choices.randint(*(min(stride, fitting) for stride in self.strides))
            start = choices.randint(0, video.frames - 1 - (self.frames - 1) * stride)
            pixels = video.read(range(start, start + (self.frames - 1) * stride + 1, stride))
        if choices.random() < self.flip:
            pixels = pixels.flip(2)
        return self._fit(pixels, choices), clip.text, stride

    def _fit(self, pixels: torch.Tensor, choices: random.Random) -> torch.Tensor:
        """8-bit frames -> 0..1, of the size of the samples; scaled one by one, as videos may be large."""
        if self.crop == "center":
            return torch.cat([first_frames(frame.unsqueeze(0) / 255, self.width, self.height) for frame in pixels])
        across, down = choices.random(), choices.random()
        return torch.cat([self._cut_at(frame.unsqueeze(0) / 255, across, down) for frame in pixels])

    def _cut_at(self, picture: torch.Tensor, across: float, down: float) -> torch.Tensor:
        """A crop at a position given as shares, 0..1, of the places there are."""
        scaled = cover(channels_first(picture), self.width, self.height)
        left = int(across * (scaled.shape[-1] - self.width + 1))
        top = int(down * (scaled.shape[-2] - self.height + 1))
        return channels_last(scaled[..., top : top + self.height, left : left + self.width])


def check_usable(dataset: ClipDataset) -> list[UnusableClip]:
    """Make sure that there is something to train on: try the clips in order until one can be used.

    Returns:
        The clips before it, which cannot be used.

    Raises:
        ValueError: none can be used.
    """
    failures = []
    for index in range(len(dataset.clips)):
        try:
            _, video = _open(dataset.clips, index, dataset.frames)
            with video:
                video.read(range(dataset.frames))
        except UnusableClip as problem:
            failures.append(UnusableClip(problem.where, problem.reason))
        else:
            return failures
    reasons = "; ".join(map(str, failures[:5]))
    end = "; ..." if len(failures) > 5 else "."
    raise ValueError(f"None of the {len(dataset.clips)} clips can be used: {reasons}{end}")


class SampleNumbers:
    """Batches of sample numbers for one of the processes of a run: process r of P takes the r-th of P batches in a row.

    Args:
        batch_size: samples of a batch.
        processes: P.
        rank: r, 0 .. P - 1.
        first: number of the sample to begin with; the processes of a continued run may be more or fewer.
        count: batches to give.

    Raises:
        ValueError: a value out of its range.
    """

    def __init__(self, batch_size: int, processes: int, rank: int, first: int, count: int):
        if batch_size < 1 or not 0 <= rank < processes or first < 0 or count < 0:
            raise ValueError(
                f"{count} batches of {batch_size} samples from {first} on, for process {rank} of {processes}: expected "
                "samples from 0 up, batches of 1 sample at least, and a process from 0 to one less than there are."
            )
        self.batch_size, self.processes, self.rank = batch_size, processes, rank
        self.first, self.count = first, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.count):
            start = self.first + (batch * self.processes + self.rank) * self.batch_size
            yield list(range(start, start + self.batch_size))


def loader(dataset: Dataset, sampler: SampleNumbers, workers: int) -> DataLoader:
    """Gives a list of samples for each of the sampler's batches, prepared by `workers` processes, 0 for none."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=list,
        # Of its own: the loader draws a seed, and the global generator is not to depend on that.
        generator=torch.Generator(),
        worker_init_fn=_ignore_signals,
    )


def _ignore_signals(worker: int) -> None:
    """Ctrl+C and SIGTERM reach all processes of a group; the training process ends its workers when it has saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class SkippedClips:
    """The clips that could not be used, in a text file: a line of where and why, divided by a tab, for each.

    Several processes may write the same file, and a continued run adds to it.

    Args:
        path: of the file; its folder is made when it is missing, the file when there is something to write.
    """

    def __init__(self, path: Path):
        self._path, self._read, self._known = path, 0, set()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._catch_up()

    @property
    def count(self) -> int:
        """Clips in the file, whichever process wrote them."""
        self._catch_up()
        return len(self._known)

    def add(self, skipped: Iterable[UnusableClip]) -> None:
        """Write down those that are not in the file yet."""
        rows = {_one_line(problem.where): _one_line(problem.reason) for problem in skipped}
        if rows.keys() <= self._known:
            return
        self._catch_up()
        lines = [f"{where}\t{reason}\n" for where, reason in rows.items() if where not in self._known]
        # One write, so that lines of several processes do not mix.
        with self._path.open("ab", buffering=0) as file:
            file.write("".join(lines).encode("utf-8", "backslashreplace"))
        self._known.update(rows)

    def _catch_up(self) -> None:
        """Read what this or another process has written since the last time."""
        if not self._path.is_file():
            return
        with self._path.open("rb") as file:
            file.seek(self._read)
            content = file.read()
        complete = content[: content.rfind(b"\n") + 1]
        self._read += len(complete)
        self._known.update(line.partition("\t")[0] for line in complete.decode("utf-8").split("\n") if line)


def _open(clips: ClipList, index: int, frames: int) -> tuple[Clip, VideoFile]:
    """A clip and its file, which has at least so many frames."""
    clip = clips[index]
    video = VideoFile(clip.path, clip.where)
    if video.frames < frames:
        video.close()
        raise UnusableClip(clip.where, f"{clip.path.name} has {video.frames} frames, needs {frames}")
    return clip, video


def _one_line(text: str) -> str:
    return text.translate({ord(character): " " for character in "\t\r\n"})
