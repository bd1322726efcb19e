"""Identity embeddings of ArcFace networks in insightface's model packs (Deng et al. 2019, arXiv 1801.07698)."""

from typing import Any

import numpy as np

from .alignment import align_arcface
from .detection import Face
from .onnx_session import release
from .pictures import resize_bilinear

EMBEDDING_SIZE = 512


class ArcFace:
    """Embeddings of aligned crops, by an onnxruntime session.

    Pixels are mapped to -1..1, as all networks of the packs antelopev2 and buffalo expect (older packs, exported from
    MXNet, scale inside the network and are not supported).

    Args:
        session: of a recognition file, such as glintr100.onnx or w600k_r50.onnx.
        source: what to call the file in an error.

    Raises:
        ValueError: a network of another kind.
    """

    def __init__(self, session: Any, source: str):
        entry, outputs = session.get_inputs()[0], session.get_outputs()
        side = entry.shape[2]
        if len(outputs) != 1 or outputs[0].shape[-1] != EMBEDDING_SIZE or side != entry.shape[3] or side % 112:
            raise ValueError(
                f"{source} reads {entry.shape} and returns {[output.shape for output in outputs]}; a face recognition "
                f"network of insightface reads squares of 112 pixels and returns {EMBEDDING_SIZE} numbers. Restore "
                "the published model pack."
            )
        self.name = source
        self.side = side
        self._session = session
        self._input = entry.name

    def embed(self, picture: np.ndarray, face: Face) -> np.ndarray:
        """Embedding (512,) of a face in a uint8 picture (H, W, 3), as the network returns it, not normalised.

        Raises:
            ValueError: key points from which no alignment follows.
        """
        return self.embed_crop(align_arcface(picture, face.points, self.side))

    def embed_crop(self, crop: np.ndarray) -> np.ndarray:
        """Embedding (512,) of an aligned uint8 crop (H, W, 3), which is scaled to the network's side if need be."""
        if crop.shape[:2] != (self.side, self.side):
            crop = resize_bilinear(crop, self.side, self.side)
        blob = (crop.astype(np.float32) - 127.5) / 127.5
        return self._session.run(None, {self._input: blob.transpose(2, 0, 1)[None]})[0].reshape(-1)

    def release(self) -> None:
        """Let go of what the session holds on a GPU until it is used again."""
        release(self._session)
