"""Small synthetic clips and their annotations."""

import json
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import torch

LOSSLESS = ("libx264rgb", "rgb24", {"qp": "0", "preset": "veryfast"})


def write_clip(
    path: Path,
    frames: torch.Tensor,
    fps: int = 8,
    *,
    codec: tuple[str, str, dict[str, str]] = LOSSLESS,
    gop: int = 12,
    b_frames: int = 0,
    times: Sequence[int] | None = None,
    rotation: int = 0,
    container: dict[str, str] | None = None,
    title: str = "",
) -> Path:
    """Write a clip: the same 8-bit RGB values come out of it, unless the codec is a lossy one. Makes its folder.

    Args:
        path: the suffix chooses the container.
        frames: (F, H, W, 3), 0..1.
        codec: name, pixel format and options; by default lossless H.264 of RGB pictures.
        gop: frames from one key frame to the next.
        b_frames: between two others, with an H.264 codec.
        times: of the frames, in units of 1 / fps, ascending; 0, 1, 2... by default.
        rotation: degrees by which a player is asked to turn the picture counterclockwise.
        container: options of the muxer.
        title: in the file's metadata.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    name, pixels, options = codec
    if "264" in name:
        options = {**options, "x264-params": f"keyint={gop}:bframes={b_frames}:b-adapt=0:scenecut=0"}
    pictures = (frames * 255).round().to(torch.uint8).numpy()
    with av.open(str(path), "w", options=container or {}) as file:
        if title:
            file.metadata["title"] = title
        stream = file.add_stream(name, rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = pictures.shape[1], pictures.shape[2], pixels
        stream.codec_context.gop_size = gop
        if rotation:
            stream.set_display_rotation(rotation)
        for picture, time in zip(pictures, times or range(len(pictures))):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, fps)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def write_annotations(path: Path, rows: Iterable[dict | str]) -> Path:
    """Write JSON lines; a row that is a string is written as it is. Makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def numbered_frames(count: int, height: int = 16, width: int = 24) -> torch.Tensor:
    """Frames (F, H, W, 3) of one colour each, 256 at most: red and green are the low and high 4 bits of the number."""
    numbers = torch.arange(count)
    colours = torch.stack([numbers % 16, numbers // 16, torch.zeros_like(numbers)], dim=-1) * 17 / 255
    return colours.view(-1, 1, 1, 3).expand(-1, height, width, 3)


def frame_numbers(frames: torch.Tensor) -> list[int]:
    """Which of `numbered_frames` these (F, H, W, 3) are, whether 8-bit or 0..1, scaled, cut, or lossy."""
    levels = frames.float() if frames.dtype == torch.uint8 else frames * 255
    low, high, _ = (levels.mean((1, 2)) / 17).round().int().unbind(-1)
    return (low + 16 * high).tolist()
