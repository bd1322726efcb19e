"""RetinaFace key points and robust alignment, as facexlib's face restoration helper makes portrait crops.

Weights: detection_Resnet50_Final.pth of xinntao/facexlib (Deng et al. 2019, arXiv 1905.00641).
"""

import numpy as np
import torch

from .alignment import PORTRAIT_BORDER, PORTRAIT_SIDE, PORTRAIT_TEMPLATE, similarity_transform, warp
from .detection import MAX_OVERLAP, Face, suppress_overlaps
from .extras import import_extra
from .torch_network import assign_weights, in_single, load_fully, managed, on_meta

PURPOSE = "RetinaFace"
# facexlib's threshold for portraits, and the mean of the training pictures (blue, green, red).
MIN_SCORE = 0.97
MEAN = (104.0, 117.0, 123.0)


class RetinaFace:
    """Detector over facexlib's network (ResNet-50).

    Args:
        state: the published file's tensors; emptied.
        source: what to call the file in an error.

    Raises:
        ImportError: facexlib is not installed.
        ValueError: weights of another network.
    """

    def __init__(self, state: dict[str, torch.Tensor], source: str):
        published = import_extra("facexlib.detection.retinaface", "facexlib", PURPOSE)
        network = on_meta(lambda: published.RetinaFace("resnet50", device=torch.device("meta")))
        state = {key.removeprefix("module."): value for key, value in state.items()}
        self.name = source
        # The only size: pictures are read as they are.
        self.sizes = (0,)
        self._configuration = network.cfg
        self._patcher = managed(assign_weights(network, in_single(state), source))

    def detect(self, picture: np.ndarray, size: int = 0) -> list[Face]:
        """Faces of a uint8 picture (H, W, 3), the most certain first; `size` is not used."""
        arithmetic = import_extra("facexlib.detection.retinaface_utils", "facexlib", PURPOSE)
        device = load_fully(self._patcher)
        pixels = torch.from_numpy(np.array(picture[..., ::-1])).to(device).movedim(-1, 0).float()
        pixels = pixels - torch.tensor(MEAN, device=device)[:, None, None]
        shifts, classes, landmarks = (output[0].float().cpu() for output in self._patcher.model(pixels.unsqueeze(0)))
        height, width = picture.shape[:2]
        anchors = arithmetic.PriorBox(self._configuration, image_size=(height, width)).forward()
        variance = self._configuration["variance"]
        scores = classes[:, 1].numpy()
        extent = np.array([width, height], dtype=np.float32)
        boxes = arithmetic.decode(shifts, anchors, variance).numpy() * np.tile(extent, 2)
        points = arithmetic.decode_landm(landmarks, anchors, variance).numpy().reshape(-1, 5, 2) * extent
        certain = np.flatnonzero(scores > MIN_SCORE)
        order = certain[np.argsort(-scores[certain], kind="stable")]
        keep = order[suppress_overlaps(boxes[order], MAX_OVERLAP)]
        return [Face(boxes[index], points[index], float(scores[index])) for index in keep]


def robust_portrait(picture: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """facexlib's portrait crop, which fits the template by least median of squares: (crop, matrix).

    Unlike least squares it leaves out points that agree badly, such as the nose of a turned face.

    Raises:
        ImportError: OpenCV is not installed.
    """
    opencv = import_extra("cv2", "opencv-python-headless", "The portrait crop of facexlib")
    matrix = opencv.estimateAffinePartial2D(points.astype(np.float64), PORTRAIT_TEMPLATE, method=opencv.LMEDS)[0]
    if matrix is None or not np.isfinite(matrix).all():
        matrix = similarity_transform(points, PORTRAIT_TEMPLATE)
    return warp(picture, matrix, PORTRAIT_SIDE, PORTRAIT_BORDER), matrix
