"""ComfyUI's own MediaPipe face landmarks as a detector: five of its 478 mesh points."""

import numpy as np
import torch

from .detection import MIN_SCORE, Face
from .extras import import_extra

# Both iris centres, tip of the nose, both corners of the mouth, as seen in the picture (canonical face mesh of
# MediaPipe's Face Landmarker).
MESH_POINTS = (468, 473, 1, 61, 291)
# BlazeFace for near faces, then for far ones.
VARIANTS = ("short", "full")
MAX_FACES = 16
REQUIRED = ("detector_short.", "detector_full.", "mesh.", "blendshapes.", "canonical_vertices", "topology.")


class MediaPipeDetector:
    """Detector over the model of ComfyUI's node Load Face Detection Model (MediaPipe).

    Args:
        state: tensors of the file in `models/detection`.
        source: what to call the file in an error.

    Raises:
        ImportError: this ComfyUI has no MediaPipe nodes.
        ValueError: a file of another kind.
    """

    # The networks scale pictures themselves.
    sizes = (0,)

    def __init__(self, state: dict[str, torch.Tensor], source: str):
        missing = [name for name in REQUIRED if not any(key.startswith(name) for key in state)]
        if missing:
            raise ValueError(
                f"{source} is no MediaPipe face landmark model: it has no {', '.join(missing)}. Choose the file "
                "that ComfyUI's node Load Face Detection Model (MediaPipe) reads."
            )
        nodes = import_extra(
            "comfy_extras.nodes_mediapipe",
            "comfy_extras",
            "The MediaPipe face detector",
            "Update ComfyUI to 0.30 or newer.",
        )
        self.name = source
        self._model = nodes.FaceLandmarkerModel(dict(state))

    def detect(self, picture: np.ndarray, size: int = 0) -> list[Face]:
        """Faces of a uint8 picture (H, W, 3), the most certain first; `size` is not used."""
        for variant in VARIANTS:
            found = self._model.detect_batch([picture], MAX_FACES, MIN_SCORE, variant)[0]
            if found:
                faces = [
                    Face(face["bbox_xyxy"], face["landmarks_xy"][list(MESH_POINTS)], float(face["score"]))
                    for face in found
                ]
                return sorted(faces, key=lambda face: -face.score)
        return []
