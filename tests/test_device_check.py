"""The command that checks a card, with tiny networks on the CPU, and the bug report form that asks for its output."""

import json
import sys
from pathlib import Path

import device_check
import psutil
import pytest
import torch
import yaml
from device_check_nodes import measure
from environment import Environment

import consistent_video
from comfy_process import REPOSITORY, comfyui_folder

STEPS = [f"2 steps, {weight_dtype}" for weight_dtype in ("fp16", "bf16", "fp8_e4m3fn")]
DECODINGS, REFERENCE = ["decode", "decode in tiles"], ["diffusers, guided step"]
SCRIPT = REPOSITORY / "scripts" / "device_check.py"


@pytest.mark.slow
@pytest.mark.parametrize("family", device_check.FAMILIES)
def test_every_row_of_a_family_has_its_numbers(family):
    kept = []
    result = measure.check(
        consistent_video, family, tiny=True, seconds=600, keep=lambda found: kept.append(list(found["rows"]))
    )
    rows = [*STEPS, *DECODINGS, *([] if family == "consisti2v" else REFERENCE)]
    assert list(result["rows"]) == rows == kept[-1] and len(kept) == len(rows)
    for name in [*STEPS, *DECODINGS]:
        row = result["rows"][name]
        assert row["finite"] and row["seconds"] > 0 and row["estimate_gib"] > 0 and row["computed_in"] == "float32"
    assert all(row["step_seconds"] > 0 for name, row in result["rows"].items() if name not in DECODINGS)
    sixteen, eight = (result["rows"][name]["of_weights_gib"] for name in STEPS[1:])
    assert eight < 0.6 * sixteen


def test_what_the_time_does_not_suffice_for_is_named():
    result = measure.check(consistent_video, "modelscope", tiny=True, seconds=-1)
    assert set(result["rows"]) == {*STEPS, *DECODINGS, *REFERENCE}
    assert all("time" in row["left out"] for row in result["rows"].values())


def test_too_little_memory_for_random_weights_is_said(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1}))
    (row,) = measure.check(consistent_video, "consisid", tiny=True, seconds=600)["rows"].values()
    assert "GiB of free RAM" in row["left out"]


def test_a_row_that_fails_says_why_and_the_others_go_on(monkeypatch):
    monkeypatch.setattr(measure, "STEPS", 1)  # no second step to time

    def broken(self, weight_dtype):
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(measure.Check, "_sample", broken)
    result = measure.check(consistent_video, "modelscope", tiny=True, seconds=600)
    assert {row["failed"] for name, row in result["rows"].items() if "steps" in name} == {"RuntimeError: out of memory"}
    assert result["rows"][REFERENCE[0]].keys() & {"failed", "step_seconds"}


def run_command(monkeypatch, *arguments) -> int:
    """The command, in the environment and with the ComfyUI of the tests."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    monkeypatch.setattr(device_check, "prepare", lambda version: Environment(Path(sys.executable), comfyui_folder()))
    monkeypatch.setattr(device_check, "run_inside", lambda environment: None)
    return device_check.main()


def test_without_an_accelerator_the_command_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert run_command(monkeypatch) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "graphics card" in line and "--cpu --tiny" in line


def test_time_that_a_family_leaves_goes_to_those_after_it(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(device_check.time, "monotonic", lambda: now[0])
    clock = device_check.Clock(480, ["modelscope", "consisid"])
    assert clock.remaining(False) == ["modelscope", "consisid"] and clock.remaining(True) == ["consisid"]
    assert clock.seconds("modelscope", False) == pytest.approx(420 * 0.15 / 0.6)
    now[0] = 10.0
    assert clock.seconds("consisid", False) == pytest.approx(410 * 0.3 / 0.45)
    assert clock.seconds("consisid", True) == pytest.approx(410)
    now[0] = 500.0
    assert clock.left == 1.0 and not clock.remaining(False)


@pytest.mark.slow
@pytest.mark.server
def test_the_command_prints_a_table_and_writes_its_numbers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(device_check, "TREES", tmp_path)
    out = tmp_path / "out.json"
    assert run_command(monkeypatch, "--cpu", "--tiny", "--family", "consisid", "--json", out) == 0
    report = json.loads(out.read_text(encoding="utf-8"))
    assert [(result["family"], result["streamed"]) for result in report["results"]] == [
        ("consisid", False),
        ("consisid", True),
    ]
    assert list(report["results"][1]["rows"]) == ["2 steps, bf16", "decode in tiles"]
    assert report["devices"] == ["cpu"] and "text encoders" in report["bypassed"]
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*STEPS, *DECODINGS, *REFERENCE, "weights streamed"))


def test_the_bug_report_form_asks_for_the_output():
    form = yaml.safe_load((REPOSITORY / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text(encoding="utf-8"))
    assert form["name"] and form["description"] and isinstance(form["body"], list)
    kinds = {"markdown", "textarea", "input", "dropdown", "checkboxes"}
    assert all(entry["type"] in kinds and entry["attributes"]["label"] for entry in form["body"])
    names = [entry["id"] for entry in form["body"]]
    assert len(set(names)) == len(names)
    asked = next(entry for entry in form["body"] if entry["id"] == "device-check")
    assert "scripts/device_check.py" in asked["attributes"]["description"] and SCRIPT.is_file()
