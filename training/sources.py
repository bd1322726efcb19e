"""The clips that settings name."""

from collections.abc import Sequence

from .clip_list import ClipList, Source
from .clips import ClipDataset, check_usable
from .settings import DataSettings, SourceSettings


def open_dataset(data: DataSettings, seed: int) -> ClipDataset:
    """The clips of a run.

    Raises:
        FileNotFoundError, ValueError: annotations are missing, or not one clip can be used.
    """
    return clip_dataset(data.sources, data, seed, data.flip)


def clip_dataset(sources: Sequence[SourceSettings], data: DataSettings, seed: int, flip: float) -> ClipDataset:
    """The clips of some sources, cut as `data` says.

    Raises:
        FileNotFoundError, ValueError: as of `open_dataset`.
    """
    clips = ClipList([Source(source.annotations, source.folder, source.captions) for source in sources])
    dataset = ClipDataset(clips, data.frames, data.width, data.height, data.strides, flip, data.crop, seed)
    check_usable(dataset)
    return dataset
