"""Single frames of video files, with PyAV."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import av
import torch

from .clip_list import UnusableClip

# Its packets are numbered in the order of decoding, which with B-frames is not that of presentation.
_UNTIMED_CONTAINERS = {"avi"}


class VideoFile:
    """A video file, open for reading; a context manager that closes it.

    Frame k is the k-th in the order of presentation, whatever the times of the frames are. To find it, the packets of
    the file are read once without decoding them.

    Args:
        path: of the file.
        where: what names the file in errors, for example its line in the annotations; its path by default.

    Attributes:
        frames: how many there are.
        decoded: how many were decoded so far, wanted or on the way to a wanted one.

    Raises:
        UnusableClip: the file is missing, is no video, or ends before what its header announces.
    """

    def __init__(self, path: Path, where: str = ""):
        self._path, self._where = path, where or str(path)
        self.decoded = 0
        self._open()
        try:
            self._times, self.frames = self._index()
        except UnusableClip:
            self.close()
            raise

    def __enter__(self) -> "VideoFile":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._container.close()

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        """The frames with these numbers, turned as the file asks players to: (F, H, W, 3), uint8, RGB.

        Decodes from the key frame before the first of them to the last of them.

        Raises:
            UnusableClip: a frame that does not exist, or cannot be decoded.
        """
        wanted = set(indices)
        for index in wanted:
            if not 0 <= index < self.frames:
                raise self._unusable(f"has {self.frames} frames, number {index} was asked for")
        with self._decoding():
            found = self._read_from_key_frame(wanted) or self._read_from_start(wanted)
        if len(found) < len(wanted):
            raise self._unusable(f"frame {min(wanted - found.keys())} of {self.frames} cannot be decoded")
        if len({frame.shape for frame in found.values()}) > 1:
            raise self._unusable("the size of its pictures changes")
        return torch.stack([found[index] for index in indices])

    def _open(self) -> None:
        with self._decoding():
            # Titles in an unknown encoding are of no interest.
            self._container = av.open(str(self._path), metadata_errors="ignore")
        self._stream = self._container.streams.best("video")
        if self._stream is None or self._stream.codec_context is None:
            self.close()
            raise self._unusable("has no video stream that can be decoded")

    def _index(self) -> tuple[list[int] | None, int]:
        """Times of the frames in the order of presentation, None when they cannot be trusted, and their number."""
        shown, count, end = [], 0, 0
        with self._decoding():
            for packet in self._container.demux(self._stream):
                if not packet.size:
                    continue
                count += 1
                end = max(end, (packet.pts or 0) + (packet.duration or 0))
                # An edit list cuts frames off that have to be decoded all the same.
                if not packet.is_discard:
                    shown.append(packet.pts)
        self._require_complete(count, end)
        times = set(shown)
        if self._container.format.name in _UNTIMED_CONTAINERS or None in times or len(times) < len(shown):
            return None, len(shown)
        return sorted(times), len(shown)

    def _require_complete(self, count: int, end: int) -> None:
        """Fewer packets than announced are right in a file trimmed by an edit list, which lasts as long as it says."""
        stream, announced = self._stream, self._stream.frames
        if count >= announced or not stream.duration:
            return
        if (stream.start_time or 0) + stream.duration - end > stream.duration / announced:
            raise self._unusable(f"announces {announced} frames, has {count}")

    def _read_from_key_frame(self, wanted: set[int]) -> dict[int, torch.Tensor] | None:
        """The frames by number; None when the times do not lead to all of them."""
        if self._times is None:
            return None
        numbers = {self._times[index]: index for index in wanted}
        try:
            self._container.seek(min(numbers), stream=self._stream)
        except av.FFmpegError:
            # Not every container can be searched.
            return None
        packets = self._container.demux(self._stream)
        start = next(packets)
        # Some containers search by the times of decoding, and may land behind the frame.
        if not start.is_keyframe or start.pts is None or start.pts > min(numbers):
            return None
        decoded = (frame for packet in chain([start], packets) for frame in packet.decode())
        found = self._pick(wanted, ((numbers.get(frame.pts), frame) for frame in decoded))
        return found if len(found) == len(wanted) else None

    def _read_from_start(self, wanted: set[int]) -> dict[int, torch.Tensor]:
        self.close()
        self._open()
        return self._pick(wanted, enumerate(self._container.decode(self._stream)))

    def _pick(self, wanted: set[int], decoded: Iterable[tuple[int | None, av.VideoFrame]]) -> dict[int, torch.Tensor]:
        """The wanted ones of decoded frames with their numbers; stops at the last one."""
        found = {}
        for number, frame in decoded:
            self.decoded += 1
            if number not in wanted:
                continue
            if frame.is_corrupt:
                raise self._unusable(f"frame {number} is damaged")
            found[number] = _pixels(frame)
            if len(found) == len(wanted):
                break
        return found

    @contextmanager
    def _decoding(self) -> Iterator[None]:
        try:
            yield
        except (av.FFmpegError, OSError) as problem:
            raise self._unusable(f"cannot be read ({problem.strerror})") from problem

    def _unusable(self, reason: str) -> UnusableClip:
        return UnusableClip(self._where, f"{self._path.name} {reason}")


def _pixels(frame: av.VideoFrame) -> torch.Tensor:
    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24"))
    return pixels.rot90(round(frame.rotation / 90), dims=(0, 1))
