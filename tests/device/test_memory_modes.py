"""The pack on a simulated card returns in every memory mode what it returns on a CPU, and leaves nothing behind."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from . import modes, waits

pytestmark = pytest.mark.device

RUN = Path(__file__).with_name("run.py")
# Between them: cast buffers of one stream, results that stay on the card, layers with and without room.
USUAL = ("lowvram_1", "gpu_only", "dynamic_half")
# What the other modes run.
CORE = ("card", "modelscope", "i2vgenxl", "consisti2v", "consisid", "story")
PARALLEL = 2
# ComfyUI merges LoRAs into weights on the card in float16.
MERGED = 1e-3


class Processes:
    """One process per mode, a few at a time; `result` waits for a mode's."""

    def __init__(self, models: Path, folder: Path) -> None:
        self._models = models
        self._folder = folder
        self._pool = ThreadPoolExecutor(PARALLEL)
        self._runs = {}

    def start(self, mode: str) -> None:
        if mode not in self._runs:
            self._runs[mode] = self._pool.submit(self._run, mode)

    def result(self, mode: str) -> dict:
        self.start(mode)
        return self._runs[mode].result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _run(self, mode: str) -> dict:
        file = self._folder / f"{mode}.pt"
        scenes = CORE if mode not in (modes.CPU, *USUAL) else ()
        command = [sys.executable, str(RUN), mode, *scenes, "--models", str(self._models), "--result", str(file)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        finished = subprocess.run(command, capture_output=True, text=True, env=environment, encoding="utf-8")
        assert file.is_file(), f"{mode} ended without a result:\n{finished.stdout[-4000:]}\n{finished.stderr[-8000:]}"
        return torch.load(file, weights_only=False)


@pytest.fixture(scope="module")
def processes(models_folder, tmp_path_factory, request):
    running = Processes(models_folder, tmp_path_factory.mktemp("device"))
    wanted = [item.callspec.params["mode"] for item in request.session.items if item.module is request.module]
    for mode in dict.fromkeys([modes.CPU, *wanted]):
        running.start(mode)
    yield running
    running.close()


def differences(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Name -> norm of the difference, relative to the norm of what is expected."""
    assert found.keys() == expected.keys()
    return {
        name: ((found[name] - value).norm() / value.norm()).item()
        for name, value in expected.items()
        if value.shape == found[name].shape
    }


in_every_mode = pytest.mark.parametrize("mode", [mode for mode in modes.MODES if mode != modes.CPU])


@in_every_mode
def test_every_mode_returns_what_a_cpu_returns(mode, processes):
    reference, found = processes.result(modes.CPU), processes.result(mode)
    assert reference["errors"] == found["errors"] == {}
    expected = reference["values"]
    if mode not in USUAL:
        expected = {name: value for name, value in expected.items() if name.partition(".")[0] in CORE}
    assert {name: value.shape for name, value in found["values"].items()} == {
        name: value.shape for name, value in expected.items()
    }
    assert [name for name, value in found["values"].items() if not value.isfinite().all()] == []
    off = {
        name: round(difference, 6)
        for name, difference in differences(found["values"], expected).items()
        if difference > max(modes.MODES[mode].tolerance, MERGED if name.startswith("lora.") else 0.0)
    }
    assert off == {}
    assert found["left"] == [] and found["pinned"] == 0


@in_every_mode
def test_the_host_waits_in_no_sampling_step(mode, processes):
    found = processes.result(mode)["waits"]
    assert found
    assert {name: waits.report(places) for name, places in found.items() if places} == {}
