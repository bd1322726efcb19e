"""Which types networks are stored and computed in, on devices with and without bfloat16."""

import logging

import comfy.cli_args
import comfy.model_management
import pytest
import tiny_consisid
import torch

from consistent_video.loaders import network
from consistent_video.loaders.cogvideox_vae import load_cogvideox_vae
from consistent_video.loaders.families import CONSISID, MODELSCOPE

FP16, BF16, FP32, FP8 = torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn
STATE = {"weight": torch.zeros(4, 4, dtype=BF16)}


@pytest.fixture
def card(monkeypatch):
    """A function that makes ComfyUI see a card with or without bfloat16; all cards have float16."""

    def set_card(bfloat16):
        management = comfy.model_management
        monkeypatch.setattr(management, "is_device_cpu", lambda device: False)
        monkeypatch.setattr(management, "should_use_fp16", lambda *args, **kwargs: True)
        monkeypatch.setattr(management, "should_use_bf16", lambda *args, **kwargs: bfloat16)

    return set_card


def chosen(weight_dtype, family=CONSISID, state=STATE):
    return network.choose_dtypes(dict(state), weight_dtype, list(family.dtypes), family.title)


@pytest.mark.parametrize(
    ("weight_dtype", "expected"),
    [
        ("default", (BF16, FP32)),
        ("fp32", (FP32, None)),
        ("fp16", (FP16, FP32)),
        ("bf16", (BF16, FP32)),
        ("fp8_e4m3fn", (FP8, FP32)),
    ],
)
def test_consisid_never_computes_in_float16_on_a_card_without_bfloat16(card, caplog, weight_dtype, expected):
    card(bfloat16=False)
    with caplog.at_level(logging.INFO):
        assert chosen(weight_dtype) == expected
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and said[0].startswith("ConsisID") and "computes in float32" in said[0]
    assert ("black frames" in said[0]) == (weight_dtype == "fp16")


@pytest.mark.parametrize(
    ("weight_dtype", "expected"),
    [
        ("default", (BF16, None)),
        ("fp32", (FP32, None)),
        ("fp16", (FP16, BF16)),
        ("bf16", (BF16, None)),
        ("fp8_e4m3fn", (FP8, BF16)),
    ],
)
def test_consisid_computes_in_bfloat16_where_there_is_one(card, caplog, weight_dtype, expected):
    card(bfloat16=True)
    with caplog.at_level(logging.INFO):
        assert chosen(weight_dtype) == expected
    assert [record.levelname for record in caplog.records] == ["WARNING"] * (weight_dtype == "fp16")


@pytest.mark.parametrize("option", ["fp16_unet", "force_fp16"])
@pytest.mark.parametrize("weight_dtype", ["default", "fp16"])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_an_option_that_asks_for_float16_acts_and_is_warned_of(
    card, caplog, monkeypatch, option, weight_dtype, bfloat16
):
    card(bfloat16)
    monkeypatch.setattr(comfy.cli_args.args, option, True)
    assert chosen(weight_dtype) == (FP16, None)
    (record,) = caplog.records
    assert record.levelname == "WARNING" and f"--{option.replace('_', '-')}" in record.getMessage()


def test_an_option_that_asks_for_float32_stores_it(card, monkeypatch):
    card(bfloat16=False)
    monkeypatch.setattr(comfy.cli_args.args, "fp32_unet", True)
    assert chosen("default") == (FP32, None)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_networks_made_for_float16_compute_in_it(card, caplog, bfloat16):
    card(bfloat16)
    for weight_dtype, stored in (("default", FP16), ("fp16", FP16)):
        assert chosen(weight_dtype, MODELSCOPE, {"weight": torch.zeros(4, 4, dtype=FP16)}) == (stored, None)
    assert not caplog.records


def test_on_a_cpu_nothing_is_said(caplog):
    with caplog.at_level(logging.INFO):
        assert [chosen(weight_dtype) for weight_dtype in ("default", "fp16")] == [(FP32, None), (FP16, FP32)]
    assert not caplog.records


@pytest.mark.parametrize(("bfloat16", "expected"), [(False, FP32), (True, BF16)])
def test_the_video_autoencoder_takes_float16_only_when_told_to(tmp_path, card, monkeypatch, caplog, bfloat16, expected):
    folder = tiny_consisid.write_consisid(tmp_path / "checkpoint")
    card(bfloat16)
    vae = load_cogvideox_vae(folder)
    assert vae.vae_dtype == expected
    assert {parameter.dtype for parameter in vae.first_stage_model.parameters()} == {expected}
    assert not [record for record in caplog.records if "float16" in record.getMessage()]
    monkeypatch.setattr(comfy.cli_args.args, "fp16_vae", True)
    assert load_cogvideox_vae(folder).vae_dtype == FP16
    assert [record.levelname for record in caplog.records if "float16" in record.getMessage()] == ["WARNING"]
