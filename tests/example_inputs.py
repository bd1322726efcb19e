"""The input files that the example workflows name.

As a command: `python tests/example_inputs.py INPUT_FOLDER` writes them into ComfyUI's input folder.
"""

import sys
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

VIDEO_NAME = "consistent_video_example.mp4"
PICTURE_NAME = "consistent_video_example.png"
WIDE_NAME = "consistent_video_wide.png"
FACE_NAME = "consistent_video_face.png"
SIZE = 256
FRAMES = 24
FPS = 8


def disc_clip(frames: int = FRAMES, size: int = SIZE) -> np.ndarray:
    """A disc that moves over a colour gradient: bytes (frames, size, size, 3)."""
    y, x = np.mgrid[0:size, 0:size] / (size - 1)
    background = np.stack([0.15 + 0.5 * x, 0.25 + 0.4 * y, 0.75 - 0.4 * x], axis=-1)
    disc = np.array([0.98, 0.82, 0.25])
    clip = np.empty((frames, size, size, 3), np.uint8)
    for index in range(frames):
        angle = 2 * np.pi * index / frames
        distance = np.hypot(x - 0.5 - 0.28 * np.cos(angle), y - 0.5 - 0.2 * np.sin(angle))
        coverage = np.clip((0.14 - distance) * size / 2 + 0.5, 0, 1)[..., None]
        clip[index] = np.rint(255 * (coverage * disc + (1 - coverage) * background))
    return clip


def write_video(path: Path, clip: np.ndarray, fps: int = FPS) -> None:
    """Write bytes (frames, height, width, 3) as an H.264 file."""
    with av.open(str(path), mode="w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width = clip.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "20"}
        for picture in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def write_picture(path: Path, clip: np.ndarray) -> None:
    """Write the first frame as a PNG."""
    Image.fromarray(clip[0]).save(path, "PNG")


def write_wide_picture(path: Path, clip: np.ndarray) -> None:
    """Write the first three frames side by side as a PNG, for the camera to pan over."""
    Image.fromarray(np.concatenate(list(clip[:3]), axis=1)).save(path, "PNG")


def write_face(path: Path, clip: np.ndarray) -> None:
    """Draw a person as a PNG: a bright face on the clip's darkened background."""
    picture = Image.fromarray(clip[0] // 3)
    draw = ImageDraw.Draw(picture)
    draw.ellipse((48, 180, 208, 340), fill=(70, 110, 160))
    draw.ellipse((80, 48, 176, 192), fill=(255, 244, 236))
    draw.chord((76, 36, 180, 150), 180, 360, fill=(96, 56, 30))
    for x in (108, 148):
        draw.ellipse((x - 6, 110, x + 6, 122), fill=(40, 60, 90))
    draw.line((128, 120, 124, 142, 132, 142), fill=(200, 150, 130), width=3)
    draw.arc((108, 138, 148, 166), 20, 160, fill=(180, 60, 60), width=4)
    picture.save(path, "PNG")


WRITERS = {
    VIDEO_NAME: write_video,
    PICTURE_NAME: write_picture,
    WIDE_NAME: write_wide_picture,
    FACE_NAME: write_face,
}


def write_inputs(folder: Path) -> None:
    """Write every input file of the example workflows; finished ones are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, write in WRITERS.items():
        if not (folder / name).exists():
            unfinished = folder / f".{name}"
            write(unfinished, disc_clip())
            unfinished.rename(folder / name)


if __name__ == "__main__":
    write_inputs(Path(sys.argv[1]))
