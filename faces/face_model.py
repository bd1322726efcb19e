"""What was found of the face networks, as one value: FACE_MODEL."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what only needs the type, such as a story, does not import the networks
    from .arcface import ArcFace
    from .detection import Detector
    from .eva_vision import EvaVision
    from .parsing import FaceParser
    from .retinaface import RetinaFace


@dataclass(frozen=True, eq=False)
class FaceModel:
    """The networks of one source. Only the detector is always there.

    Attributes:
        name: the source's name.
        detector: finds faces and their key points.
        recogniser: identity embeddings (ArcFace).
        aligner: key points for portrait crops; without it the detector's are used.
        parser: cuts faces out.
        vision: EVA02-CLIP features.
        missing: attribute -> what is missing, where it is published and where it goes.
    """

    name: str
    detector: Detector
    recogniser: ArcFace | None = None
    aligner: RetinaFace | None = None
    parser: FaceParser | None = None
    vision: EvaVision | None = None
    missing: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def in_use(self) -> Iterator[FaceModel]:
        """Use the networks inside; afterwards those that ComfyUI does not manage give their GPU memory back."""
        try:
            yield self
        finally:
            for network in (self.detector, self.recogniser):
                release = getattr(network, "release", None)
                if release is not None:
                    release()

    def require_recogniser(self) -> ArcFace:
        """The recogniser.

        Raises:
            FileNotFoundError: it was not found.
        """
        if self.recogniser is None:
            raise FileNotFoundError(
                f"The face model '{self.name}' finds and aligns faces but cannot tell who they are: identity "
                f"embeddings need published weights. {self.missing.get('recogniser', '')}".strip()
            )
        return self.recogniser
