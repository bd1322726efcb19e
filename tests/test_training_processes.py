"""Training on several processes of this machine, which talk over gloo, as a user starts it."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_clips import write_annotations, write_clip
from training_runs import FRAMES, SIDE, consisti2v_settings, inference, losses, metrics  # noqa: F401

import tiny_checkpoints
from comfy_process import REPOSITORY, comfyui_folder
from consistent_video.loaders.motion_predictor import load_motion_predictor
from consistent_video.training.checkpoints import PROGRESS, STATE, complete, folder_name
from consistent_video.training.settings import MotionPredictorSettings

pytestmark = pytest.mark.slow

STEPS = 4
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A tiny ConsistI2V folder."""
    return tiny_checkpoints.write_consisti2v(tmp_path_factory.mktemp("base") / "ConsistI2V")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four clips and a file that is none."""
    folder = tmp_path_factory.mktemp("videos")
    generator = torch.Generator().manual_seed(0)
    for number in range(4):
        write_clip(folder / f"{number}.mp4", torch.rand(8, SIDE, SIDE + 8 * number, 3, generator=generator))
    (folder / "broken.mp4").write_bytes(b"no video")
    rows = [{"file": f"{name}.mp4", "text": f"clip {name}"} for name in (0, 1, "broken", 2, 3)]
    annotations = write_annotations(folder / "annotations.jsonl", rows)
    source = {"annotations": str(annotations), "folder": str(folder)}
    return {"sources": [source], "frames": FRAMES, "width": SIDE, "height": SIDE, "strides": [1, 3], "workers": 1}


def start(processes: int, trainer: str, settings) -> subprocess.Popen:
    """Start a trainer with the command of the documentation, in a process group of its own."""
    settings.output.mkdir(parents=True, exist_ok=True)
    file = settings.output / "run.yaml"
    file.write_text(yaml.safe_dump(settings.model_dump(mode="json")), encoding="utf-8")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    # --multi_gpu starts several processes, and excludes --cpu; the variable is what --cpu sets
    command += ["--multi_gpu", "--rdzv_backend", "c10d"] if processes > 1 else []
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["-m", "consistent_video_train", trainer, str(file), f"batch_size={4 // processes}"]
    environment = {**os.environ, "COMFYUI_PATH": str(comfyui_folder()), "OMP_NUM_THREADS": "1"}
    environment["ACCELERATE_USE_CPU"] = "true"
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, encoding="utf-8", start_new_session=True
    )


def launch(processes: int, trainer: str, settings) -> str:
    """Run a trainer to its end; returns what it said."""
    running = start(processes, trainer, settings)
    _, said = running.communicate()
    assert running.returncode == 0, said[-4000:]
    return said


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory, pretrained, data):
    """Settings of the same run on one process and on two, both done."""
    runs = []
    for processes in (1, 2):
        output = tmp_path_factory.mktemp("runs") / str(processes)
        settings = consisti2v_settings(
            output, pretrained, data=data, steps=STEPS, save_every=STEPS, tracker="tensorboard", ema=True
        )
        launch(processes, "consisti2v", settings)
        runs.append(settings)
    return runs


def test_two_processes_learn_what_one_learns(one_and_two):
    one, two = one_and_two
    assert len(losses(one)) == STEPS
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    norms = [[row["gradient_norm"] for row in metrics(run)] for run in one_and_two]
    assert norms[1] == pytest.approx(norms[0], rel=2e-2)
    assert norms[1][0] == pytest.approx(norms[0][0], rel=1e-4)


def test_two_processes_arrive_where_one_arrives(one_and_two, pretrained):
    start = load_file(pretrained / WEIGHTS)
    one, two = (load_file(run.output / "checkpoints" / folder_name(STEPS) / WEIGHTS) for run in one_and_two)
    way = sum((one[key] - start[key]).square().sum() for key in start) ** 0.5
    apart = sum((one[key] - two[key]).square().sum() for key in start) ** 0.5
    # Adam's first steps have the length of the learning rate even where a gradient is but rounding
    assert way > 1
    assert apart < 0.05 * way


def test_both_processes_leave_their_state(one_and_two):
    state = one_and_two[1].output / "checkpoints" / folder_name(STEPS) / STATE
    assert {"random_states_0.pkl", "random_states_1.pkl", "optimizer.bin"} <= {path.name for path in state.iterdir()}


def test_samples_of_all_processes_are_counted(one_and_two):
    for run in one_and_two:
        record = run.output / "checkpoints" / folder_name(STEPS) / PROGRESS
        assert json.loads(record.read_text(encoding="utf-8"))["samples"] == 4 * STEPS


def test_the_clip_that_is_none_is_listed_once(one_and_two):
    for run in one_and_two:
        lines = (run.output / "skipped_clips.txt").read_text(encoding="utf-8").splitlines()
        assert len(lines) == 1
        assert lines[0].split("\t")[0].endswith("annotations.jsonl:3")
        assert metrics(run)[-1]["skipped"] == 1


def test_curves_are_kept_for_tensorboard(one_and_two):
    for run in one_and_two:
        events = EventAccumulator(str(run.output / "logs" / "consistent_video")).Reload()
        assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses(run), rel=1e-6)


def test_a_terminated_group_of_processes_saves(tmp_path, pretrained, data):
    settings = consisti2v_settings(
        tmp_path / "run", pretrained, data={**data, "workers": 2}, steps=1000, save_every=1000
    )
    running = start(1, "consisti2v", settings)
    written = settings.output / "metrics.jsonl"
    while running.poll() is None and not (written.is_file() and written.stat().st_size):
        time.sleep(0.1)
    os.killpg(running.pid, signal.SIGTERM)
    _, errors = running.communicate()
    for _ in range(300):  # the launcher may end before the trainer has saved
        found = complete(settings.output / "checkpoints")
        if found:
            break
        time.sleep(0.1)
    assert len(found) == 1, errors[-4000:]
    assert int(found[0].name.removeprefix("step-")) == len(losses(settings)) < 1000


def test_the_motion_predictor_is_trained_by_the_command_too(tmp_path, models_folder, data):
    settings = MotionPredictorSettings(
        output=tmp_path / "run",
        i2vgenxl=models_folder / "diffusers" / tiny_checkpoints.I2VGENXL_NAME,
        data=data,
        held_out=data["sources"],
        held_out_clips=2,
        predictor={"hidden_size": 32, "num_layers": 1, "num_attention_heads": 2, "image_tokens": 2},
        steps=2,
        validate_every=2,
        video_loss=0.5,
        mixed_precision="fp32",
        tracker="none",
    )
    said = launch(1, "motion_predictor", settings)
    assert re.search(r"Stopped after step 2: \S+step-00000002\. 1 clips could not be used", said)
    assert [round(value, 6) > 0 for value in losses(settings)] == [True, True]
    measured = metrics(settings)[-1]
    ratio = measured["validation/error"] / measured["validation/linear_error"]
    assert measured["validation/ratio"] == pytest.approx(ratio, rel=1e-6)
    file = settings.output / "checkpoints" / folder_name(2) / "motion_predictor.safetensors"
    assert load_motion_predictor(file).config["hidden_size"] == 32


SHARDED_RUN = """
import os, sys
sys.path[:0] = [{tests!r}, {scripts!r}]
from comfy_process import enter
enter()
from pathlib import Path
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from training_runs import NumberedClips, consisti2v_settings
from consistent_video.training.consisti2v import SHARDED, ConsistI2VTask

dist.init_process_group("gloo")
settings = consisti2v_settings(Path(sys.argv[1]), Path(sys.argv[2]), gradient_checkpointing=True)


def doubled(value):
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    return value


def task_in_float64():
    # so that the sums of another order that a kernel or a shard makes are no difference
    task = ConsistI2VTask(settings)
    task.network.double().register_forward_pre_hook(
        lambda module, inputs, named: (
            tuple(map(doubled, inputs)),
            {{name: doubled(value) for name, value in named.items()}},
        ),
        with_kwargs=True,
    )
    return task


task = task_in_float64()
dataset = NumberedClips()
plain = [task.loss(task.network, [dataset[number]]) for number in range(2)]
(sum(plain) / 2).backward()
expected = {{name: parameter.grad for name, parameter in task.network.named_parameters()}}

task = task_in_float64()
mesh = dist.init_device_mesh("cpu", (2,))
wrapped = [module for module in task.network.modules() if type(module).__name__ in SHARDED]
for module in (*wrapped, task.network):
    fully_shard(module, mesh=mesh)
loss = task.loss(task.network, [dataset[dist.get_rank()]])
loss.backward()
torch.testing.assert_close(loss.detach(), plain[dist.get_rank()].detach(), rtol=1e-6, atol=0)
for name, parameter in task.network.named_parameters():
    assert isinstance(parameter, DTensor), name
    gradient = expected[name]
    if gradient is not None:
        torch.testing.assert_close(parameter.grad.full_tensor(), gradient, rtol=1e-5, atol=1e-8, msg=name)
print("agrees", len(wrapped))
dist.destroy_process_group()
"""


def test_sharded_layers_give_the_same_loss_and_gradients(tmp_path, pretrained):
    """What accelerate's FSDP shards, which runs on accelerators only, sharded by torch on the CPU."""
    script = tmp_path / "sharded.py"
    script.write_text(
        SHARDED_RUN.format(tests=str(REPOSITORY / "tests"), scripts=str(REPOSITORY / "scripts")), encoding="utf-8"
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--standalone",
        str(script),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, str(tmp_path), str(pretrained)], env=environment, capture_output=True, encoding="utf-8", check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.count("agrees") == 2
