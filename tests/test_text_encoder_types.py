"""Types that ComfyUI's command line names for text encoders act on T5."""

import comfy.cli_args
import pytest
import torch

from consistent_video.loaders import checkpoint
from consistent_video.loaders.families import CONSISID
from consistent_video.loaders.t5_text_encoder import storage_dtype
from native_sampling import conditioning

FLAGS = {
    "fp8_e4m3fn_text_enc": torch.float8_e4m3fn,
    "fp8_e5m2_text_enc": torch.float8_e5m2,
    "fp16_text_enc": torch.float16,
    "bf16_text_enc": torch.bfloat16,
    "fp32_text_enc": torch.float32,
}


@pytest.fixture
def ask(monkeypatch):
    """Start ComfyUI, as it were, with one of the options, or with none."""

    def choose(flag=None):
        for name in FLAGS:
            monkeypatch.setattr(comfy.cli_args.args, name, name == flag)

    return choose


@pytest.mark.parametrize("flag", FLAGS)
def test_an_option_chooses_the_type_of_float32_weights(flag, ask):
    ask(flag)
    assert storage_dtype(torch.float32) == FLAGS[flag]


def test_without_an_option_float32_becomes_comfyuis_type_and_half_stays(ask):
    ask()
    assert storage_dtype(torch.float32) == torch.float16
    assert storage_dtype(torch.bfloat16) == torch.bfloat16
    assert storage_dtype(torch.float8_e4m3fn) == torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("flag", "file", "kept"),
    [
        ("fp32_text_enc", torch.bfloat16, torch.bfloat16),
        ("fp16_text_enc", torch.bfloat16, torch.float16),
        ("bf16_text_enc", torch.float16, torch.bfloat16),
        ("bf16_text_enc", torch.float8_e4m3fn, torch.float8_e4m3fn),
        ("fp8_e4m3fn_text_enc", torch.bfloat16, torch.float8_e4m3fn),
    ],
)
def test_a_larger_type_than_the_files_is_not_taken(flag, file, kept, ask):
    ask(flag)
    assert storage_dtype(file) == kept


@pytest.mark.parametrize(("flag", "difference"), [("fp8_e4m3fn_text_enc", 0.3), ("bf16_text_enc", 0.02)])
def test_a_smaller_text_encoder_gives_nearly_the_same_prompt(models_folder, flag, difference, ask):
    folder = models_folder / "diffusers" / "ConsisID-preview"
    whole = checkpoint.load_folder_clip(CONSISID, folder)
    ask(flag)
    small = checkpoint.load_folder_clip(CONSISID, folder)
    weights = list(small.cond_stage_model.t5xxl.transformer.parameters())
    assert {weight.dtype for weight in weights} == {FLAGS[flag]}
    expected, found = (conditioning(clip, "a cat")[0][0] for clip in (whole, small))
    assert 0 < (found - expected).norm() / expected.norm() < difference
