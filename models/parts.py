"""Conditions of a clip that are cut where ComfyUI evaluates a part of the clip: an area, or a context window.

ComfyUI cuts what has the size of the latent. These conditions belong to frames or to tokens, or describe where a clip
begins. An area comes as (frames, height, width, first frame, top, left) in latent pixels.
"""

from collections.abc import Callable, Sequence

import comfy.conds
import torch

FRAME_AXIS = 2


def window_frames(window) -> tuple[int, ...]:
    """Numbers of the frames that a context window over frames hands to the model, among them the one put in front."""
    anchor = getattr(window, "causal_anchor_index", None)
    return (*([] if anchor is None or anchor < 0 else [anchor]), *window.index_list)


def has_spare_frame(window) -> bool:
    """Whether the first frame of a context window is there for the others only, and its prediction is dropped."""
    return len(window_frames(window)) > len(window.index_list)


class Whole(comfy.conds.CONDRegular):
    """A condition (B, ...) that has nothing to do with the place in the clip."""

    def in_window(self, window) -> "Whole":
        return self


class OfFrames(comfy.conds.CONDRegular):
    """A condition (B, F, ...) with an entry for each frame."""

    def process_cond(self, batch_size, area=None, **kwargs):
        part = self if area is None else self._copy_with(self.cond.narrow(1, area[3], area[0]))
        return super(OfFrames, part).process_cond(batch_size, **kwargs)

    def in_window(self, window) -> "OfFrames":
        if window.dim != FRAME_AXIS:
            return self
        return self._copy_with(self.cond[:, list(window_frames(window))])


class OneFrame(comfy.conds.CONDRegular):
    """A frame (B, C, 1, h, w) that goes with every part of the clip; areas cut its height and width."""

    def process_cond(self, batch_size, area=None, **kwargs):
        part = self
        if area is not None:
            part = self._copy_with(self.cond.narrow(3, area[4], area[1]).narrow(4, area[5], area[2]))
        return super(OneFrame, part).process_cond(batch_size, **kwargs)

    def in_window(self, window) -> "OneFrame":
        return self if window.dim == FRAME_AXIS else self._copy_with(window.get_tensor(self.cond))


class FrameNumbers(comfy.conds.CONDConstant):
    """Which frames of the clip the model is handed: (their numbers, whether the first is there for the others only)."""

    def process_cond(self, batch_size, area=None, **kwargs):
        numbers, spare = self.cond
        if area is not None:
            numbers, spare = numbers[area[3] : area[3] + area[0]], spare and area[3] == 0
        return self._copy_with((numbers, spare))

    def in_window(self, window) -> "FrameNumbers":
        if window.dim != FRAME_AXIS:
            return self
        return self._copy_with((window_frames(window), has_spare_frame(window)))


class PictureAndPositions(comfy.conds.CONDNoiseShape):
    """What is made of planes (B, C, F, h, w) whose first frame is the picture that the clip starts from.

    Every part of the clip keeps the picture in its first frame; the planes of its other frames are their own.

    Args:
        cond: `encode` of the planes.
        planes: None for a part that is not cut again.
        encode: (B, C, F, h, w) -> (B, C', F, h, w), pixel by pixel.
    """

    def __init__(self, cond: torch.Tensor, planes: torch.Tensor | None = None, encode: Callable | None = None):
        super().__init__(cond)
        self.planes, self.encode = planes, encode
        self.parts: dict[tuple[int, ...], PictureAndPositions] = {}

    def of_frames(self, numbers: Sequence[int]) -> "PictureAndPositions":
        """The condition of some frames; computed once for each choice of them in a run."""
        numbers = tuple(numbers)
        if numbers == tuple(range(self.cond.shape[2])):
            return self
        if numbers not in self.parts:
            planes = self.planes[:, :, list(numbers)]
            planes[:, :, 0] = self.planes[:, :, 0]
            self.parts[numbers] = type(self)(self.encode(planes), planes, self.encode)
        return self.parts[numbers]

    def process_cond(self, batch_size, area=None, **kwargs):
        part = self
        if area is not None:
            part, area = self.of_frames(range(area[3], area[3] + area[0])), [*area[:3], 0, *area[4:]]
        return super(PictureAndPositions, part).process_cond(batch_size, area=area, **kwargs)

    def in_window(self, window) -> "PictureAndPositions":
        if window.dim == FRAME_AXIS:
            return self.of_frames(window_frames(window))
        return type(self)(window.get_tensor(self.cond), window.get_tensor(self.planes), self.encode)


class StartOfClip(comfy.conds.CONDNoiseShape):
    """A condition (B, C, F, h, w) of a clip from its beginning; a part of the clip is a clip of its own."""

    def process_cond(self, batch_size, area=None, **kwargs):
        area = None if area is None else [*area[:3], 0, *area[4:]]
        return super().process_cond(batch_size, area=area, **kwargs)

    def in_window(self, window) -> "StartOfClip":
        return self._copy_with(self.cond[:, :, : len(window_frames(window))])


class Tokens(comfy.conds.CONDRegular):
    """Tokens of a clip's patches, in any number of dimensions, one of them N; a part of the clip is a clip of its own.

    Args:
        cond: (..., T + N, ...).
        axis: which dimension that is.
        before: T.
        grid: frames, rows and columns of the N tokens.
        side: of a patch, in latent pixels.
    """

    def __init__(self, cond, axis: int = 1, before: int = 0, grid: tuple[int, int, int] = (), side: int = 1):
        super().__init__(cond)
        self.axis, self.before, self.grid, self.side = axis, before, grid, side

    def _copy_with(self, cond, **options):
        return type(self)(cond, self.axis, self.before, self.grid, self.side)

    def process_cond(self, batch_size, area=None, **kwargs):
        part = self
        if area is not None:
            height, width, top, left = (size // self.side for size in (area[1], area[2], area[4], area[5]))
            part = self._copy_with(self._cut(self.cond, area[0], (top, height), (left, width)))
        return super(Tokens, part).process_cond(batch_size, **kwargs)

    def in_window(self, window) -> "Tokens":
        frames = len(window_frames(window))
        part = self._copy_with(self._cut(self.cond, frames, (0, self.grid[1]), (0, self.grid[2])))
        part.grid = (frames, *self.grid[1:])
        return part

    def _cut(self, tokens, frames: int, rows: tuple[int, int], columns: tuple[int, int]):
        """The tokens before, and those of the first frames at (start, length) of the rows and the columns."""
        before, clip = tokens.tensor_split((self.before,), dim=self.axis)
        clip = clip.unflatten(self.axis, self.grid).narrow(self.axis, 0, frames)
        clip = clip.narrow(self.axis + 1, *rows).narrow(self.axis + 2, *columns).flatten(self.axis, self.axis + 2)
        return torch.cat((before, clip), dim=self.axis)


class Angles(Tokens):
    """Rotary angles of a clip's tokens, the same for all clips, in a tuple, in which ComfyUI leaves them in float32.

    To find the tables of two prompts equal, nobody has to read their values from the device: those of the same part of
    the clip are.
    """

    part: tuple = ()

    def _cut(self, tokens, *part):
        return (super()._cut(tokens[0], *part),)

    def process_cond(self, batch_size, area=None, **kwargs):
        if area is None:
            return self
        height, width, top, left = (size // self.side for size in (area[1], area[2], area[4], area[5]))
        cut = self._copy_with(self._cut(self.cond, area[0], (top, height), (left, width)))
        cut.part = (area[0], height, width, top, left)
        return cut

    def can_concat(self, other, **options) -> bool:
        return self.part == other.part and self.cond[0].shape == other.cond[0].shape

    def concat(self, others, **options):
        return self.cond

    def size(self, **options) -> list[int]:
        return [1]
