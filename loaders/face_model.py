"""Published face weights -> FACE_MODEL: which sources there are, what each holds, and what is missing.

A source is a model pack of insightface (`models/insightface/models/<pack>/*.onnx`), the `face_encoder` folder of a
ConsisID checkpoint, a MediaPipe file of ComfyUI in `models/detection`, or the detector that comes with scikit-image.
The other networks of ConsisID's face pipeline are taken from the source's folder, else from the shared ones.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import folder_paths
from safetensors import SafetensorError, safe_open

from ..faces.arcface import EMBEDDING_SIZE, ArcFace
from ..faces.cascade import CascadeDetector
from ..faces.detection import Detector
from ..faces.eva_vision import EvaVision
from ..faces.face_model import FaceModel
from ..faces.mediapipe import MediaPipeDetector
from ..faces.onnx_session import OnnxNetwork
from ..faces.parsing import FaceParser
from ..faces.retinaface import RetinaFace
from ..faces.scrfd import Scrfd
from . import fingerprint
from .folders import checkpoint_folders
from .weights import read_weights

BUILT_IN = "built-in detector"
INSIGHTFACE = "insightface"
MEDIAPIPE = "mediapipe"
FACE_ENCODER = "face_encoder"
# Networks of insightface's packs that nobody here needs.
UNUSED_NETWORKS = ("1k3d68", "2d106det", "genderage")
LICENCE = "insightface's published models are for non-commercial research only"
FACEXLIB_FOLDERS = ("facexlib", "facedetection")
# Part -> stem of the published file, folders of `models` it is looked for in, class, publisher.
PARTS: dict[str, tuple[str, tuple[str, ...], Callable, str]] = {
    "aligner": (
        "detection_Resnet50_Final",
        FACEXLIB_FOLDERS,
        RetinaFace,
        "xinntao/facexlib, release v0.1.0, detection_Resnet50_Final.pth",
    ),
    "parser": (
        "parsing_bisenet",
        FACEXLIB_FOLDERS,
        FaceParser,
        "xinntao/facexlib, release v0.2.0, parsing_bisenet.pth",
    ),
    "vision": (
        "EVA02_CLIP_L_336_psz14_s6B",
        ("clip_vision",),
        EvaVision,
        "QuanSun/EVA-CLIP, EVA02_CLIP_L_336_psz14_s6B.pt",
    ),
}
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


def list_face_sources() -> list[str]:
    """Names of everything that a face model can be loaded from; the built-in detector is last and always there."""
    return [*sorted(_folders()), *sorted(_mediapipe_files()), BUILT_IN]


def explain_missing_face_source(name: str | None) -> bool | str:
    """True when the source exists, else a message that says where to get it and where to put it.

    Also True for None, which ComfyUI says in place of a name that comes over a wire: loading then tells.
    """
    if name is None or str(name) in list_face_sources():
        return True
    return f"Face model '{name}' was not found. {_where_packs_go()} Then refresh the node list (R)."


def load_face_model(source: str, provider: str = "auto") -> FaceModel:
    """Load what a source holds of the face networks.

    Args:
        source: a name of `list_face_sources`.
        provider: what onnxruntime computes on, a key of `faces.onnx_session.PROVIDERS`.

    Raises:
        FileNotFoundError: unknown source, or a pack without a detector.
        ImportError: an optional package that the source's detector needs is missing.
        ValueError: a file is damaged or of another kind, or the provider is not available.
    """
    folders = _folders()
    missing = {}
    recogniser = None
    if source in folders:
        detector, recogniser = _load_pack(folders[source], provider)
        logging.info("Face model %s: %s.", source, LICENCE)
    else:
        detector = _load_detector(source)
    if recogniser is None:
        missing["recogniser"] = f"{_where_packs_go()} Then choose it in Load Face Model."
    parts = {}
    for part in PARTS:
        found = _load_part(part, folders.get(source))
        if isinstance(found, str):
            missing[part] = found
        else:
            parts[part] = found
    return FaceModel(source, detector, recogniser, missing=missing, **parts)


def fingerprint_face_source(source: str | None) -> str:
    """Changes when a file that the source is loaded from is added, removed or rewritten.

    See `fingerprint.of_choice`.
    """
    return fingerprint.of_choice(source, list_face_sources, _fingerprint_source)


def _fingerprint_source(source: str) -> str:
    folder = _folders().get(source)
    files = [*(_onnx_files(folder) if folder else []), _mediapipe_files().get(source)]
    files += [_part_file(part, folder) for part in PARTS]
    return "\n".join(f"{file} {fingerprint.of_file(Path(file))}" for file in files if file)


def _load_detector(source: str) -> Detector:
    if source == BUILT_IN:
        return CascadeDetector()
    file = _mediapipe_files().get(source)
    if file is None:
        raise FileNotFoundError(explain_missing_face_source(source))
    return MediaPipeDetector(read_weights([file]), str(file))


def _load_pack(folder: Path, provider: str) -> tuple[Scrfd, ArcFace | None]:
    """Detector and recogniser of a pack, told apart by their outputs, the first of each by name."""
    detector = recogniser = None
    for file in _onnx_files(folder):
        if file.stem in UNUSED_NETWORKS:
            continue
        session = OnnxNetwork(file, provider)
        outputs = session.get_outputs()
        if len(outputs) > 1:
            detector = detector or Scrfd(session, str(file))
        elif outputs[0].shape[-1] == EMBEDDING_SIZE:
            recogniser = recogniser or ArcFace(session, str(file))
    if detector is None:
        names = ", ".join(file.name for file in _onnx_files(folder))
        raise FileNotFoundError(
            f"{folder} has no face detector; found {names or 'no .onnx files'}. {_where_packs_go()}"
        )
    return detector, recogniser


def _load_part(part: str, folder: Path | None) -> object:
    """The network of a part, or a sentence that says what it lacks; damaged files raise ValueError."""
    _, kinds, network, publisher = PARTS[part]
    file = _part_file(part, folder)
    if file is None:
        return f"Put {publisher}, into {_roots(kinds[0])[0]} (or the face_encoder folder of a ConsisID checkpoint)."
    try:
        return network(read_weights([file]), str(file))
    except ImportError as error:
        return str(error)


def _part_file(part: str, folder: Path | None) -> Path | None:
    """The file of a part: of the source's folder, else of the first folder that has one."""
    stem, kinds, *_ = PARTS[part]
    roots = [
        *([folder] if folder else []),
        *(root for kind in kinds for root in _roots(kind)),
        *_face_encoders().values(),
    ]
    candidates = (root / f"{stem}{suffix}" for root in roots for suffix in WEIGHT_SUFFIXES)
    return next((path for path in candidates if path.is_file()), None)


def _folders() -> dict[str, Path]:
    """Folders with ONNX face networks: packs of insightface and face_encoder folders of checkpoints, by name."""
    found = {}
    for root in _roots(INSIGHTFACE):
        for parent in (root / "models", root):
            for folder in sorted(parent.iterdir()) if parent.is_dir() else ():
                if folder != root / "models" and _onnx_files(folder):
                    found.setdefault(f"{INSIGHTFACE}/{folder.name}", folder)
    encoders = {name: folder for name, folder in _face_encoders().items() if _onnx_files(folder)}
    return found | encoders


def _face_encoders() -> dict[str, Path]:
    folders = {f"{name}/{FACE_ENCODER}": folder / FACE_ENCODER for name, folder in checkpoint_folders().items()}
    return {name: folder for name, folder in folders.items() if folder.is_dir()}


def _onnx_files(folder: Path) -> list[Path]:
    """ONNX files of a pack; its archive unpacks into a folder of its own name, and face_encoder into models/<pack>."""
    for pattern in ("*.onnx", "*/*.onnx", "models/*/*.onnx"):
        files = sorted(folder.glob(pattern))
        if files:
            return files
    return []


def _mediapipe_files() -> dict[str, Path]:
    """Safetensors files in `models/detection` that hold ComfyUI's MediaPipe face networks."""
    paths = {
        name: folder_paths.get_full_path("detection", name) for name in folder_paths.get_filename_list("detection")
    }
    return {f"{MEDIAPIPE}/{name}": Path(path) for name, path in paths.items() if path and _is_mediapipe(Path(path))}


def _is_mediapipe(file: Path) -> bool:
    if file.suffix != ".safetensors":
        return False
    try:
        with safe_open(file, framework="pt") as content:
            return any(key.startswith("detector_short.") for key in content.keys())
    except (SafetensorError, OSError):
        return False


def _roots(kind: str) -> list[Path]:
    """Where a kind of model lies: registered folders, then the one of that name under `models`."""
    registered = folder_paths.get_folder_paths(kind) if kind in folder_paths.folder_names_and_paths else []
    return list(dict.fromkeys(Path(path) for path in (*registered, Path(folder_paths.models_dir) / kind)))


def _where_packs_go() -> str:
    return (
        "Unpack the model pack antelopev2 (for ConsisID) or buffalo_l (for PhotoMaker v2), published by "
        f"deepinsight/insightface (release v0.7; {LICENCE}), so that its .onnx files lie in "
        f"{_roots(INSIGHTFACE)[0] / 'models'}/<pack>."
    )
