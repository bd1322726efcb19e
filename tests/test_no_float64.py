"""The devices of Apple and Intel have no float64: what runs on a device makes no tensor of it there.

A tensor on the meta device stands for one on such a device. Whole runs are held by the simulated card, which refuses
float64 as well.
"""

import comfy.model_sampling
import comfy.ops
import pytest
import torch
from test_consisid_network import PUBLISHED as CONSISID
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from consistent_video.models import consisid_transformer
from consistent_video.models.adopt import adopt
from consistent_video.models.consisid_transformer import ConsisIDTransformer
from consistent_video.models.consisti2v_unet import ConsistI2VUNet
from consistent_video.models.motion_predictor import MotionPredictor
from consistent_video.patches.free_u import scale_low_frequencies
from consistent_video.samplers.guidance import network_output
from consistent_video.samplers.reference import DDIM

DOUBLE = (torch.float64, torch.complex128)


class WithoutFloat64(TorchDispatchMode):
    """Refuses to make a tensor of 64-bit floats on the meta device."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "meta" and tensor.dtype in DOUBLE:
                raise TypeError(f"{operation}: this device has no {tensor.dtype}")
        return result


def of(*shape):
    return torch.empty(shape, device="meta")


def test_it_is_refused():
    with WithoutFloat64(), pytest.raises(TypeError, match="has no torch.float64"):
        of(2).double()


@pytest.mark.parametrize("rotary", [True, False])
def test_positions_of_consisid(rotary):
    settings = {**CONSISID, "num_layers": 2, "use_learned_positional_embeddings": False}
    with torch.device("meta"):
        network = ConsisIDTransformer(**{**settings, "use_rotary_positional_embeddings": rotary})
    network = adopt(network, comfy.ops.manual_cast, consisid_transformer.REPLACEMENTS)
    face = of(1, 1280), [of(1, 577, 1024)] * 5
    with WithoutFloat64():
        known = network.condition(of(1, 226, 4096), of(1, 16, 2, 8, 8), *face)
    assert (known.rotary is not None) == rotary
    assert known.picture.shape == (1, 2 * 4 * 4, 3072)


def test_rotations_and_windows_of_consisti2v():
    with torch.device("meta"):
        network = adopt(ConsistI2VUNet(layers_per_block=1), comfy.ops.manual_cast)
    with WithoutFloat64():
        assert network(of(1, 4, 3, 8, 8), of(1), of(1, 7, 1024)).shape == (1, 4, 3, 8, 8)


def test_frame_positions_of_the_motion_predictor():
    with torch.device("meta"):
        network = adopt(MotionPredictor(num_layers=1, image_token_layers=1), comfy.ops.manual_cast)
    with WithoutFloat64():
        assert network(of(1, 1024), of(1, 1024), of(1, 257, 1280), of(1, 257, 1280), 4).shape == (1, 4, 1024)


def test_low_frequencies_of_freeu():
    with WithoutFloat64():
        assert scale_low_frequencies(of(2, 8, 6, 7).half(), 0.5).dtype == torch.float16


def test_thresholds_and_guidance():
    config, clip = {"thresholding": True, "sample_max_value": 2.0}, of(2, 4, 3, 8, 8)
    sampling = comfy.model_sampling.V_PREDICTION()
    sampling.sigma_data = 1.0
    with WithoutFloat64():
        assert DDIM(config, torch.zeros(2), [0.1, 0.9]).limit(clip).shape == clip.shape
        assert network_output(sampling, of(2), clip, clip).shape == clip.shape
