"""The loop of training: steps, accumulation, averages, checkpoints that continue to the bit, and how a run ends."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from training_runs import NumberedClips, consisti2v_settings, data_settings, inference, losses, metrics, run_of  # noqa: F401

from comfy_process import REPOSITORY
from consistent_video.training import checkpoints, engine
from consistent_video.training.consisti2v import ConsistI2VTask

pytestmark = pytest.mark.slow

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A tiny ConsistI2V folder."""
    import tiny_checkpoints

    return tiny_checkpoints.write_consisti2v(tmp_path_factory.mktemp("base") / "ConsistI2V")


def train(settings, dataset=None) -> engine.Run:
    run = run_of(ConsistI2VTask(settings), dataset)
    run.train()
    return run


def weights(settings, step: int) -> dict[str, torch.Tensor]:
    return load_file(settings.output / "checkpoints" / checkpoints.folder_name(step) / WEIGHTS)


@pytest.mark.parametrize("changes", [{}, {"ema": True, "ema_decay": 0.9, "schedule": "cosine", "warmup_steps": 3}])
def test_ten_steps_are_five_and_five_more(tmp_path, pretrained, changes):
    whole = consisti2v_settings(tmp_path / "whole", pretrained, **changes)
    halves = consisti2v_settings(tmp_path / "halves", pretrained, **changes)
    train(whole)

    class Interrupted(NumberedClips):
        """Asks the run to stop while it makes the fifth clip."""

        def __getitem__(self, number):
            if number == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__getitem__(number)

    first = train(halves, Interrupted())
    assert first.step == 5
    second = run_of(ConsistI2VTask(halves))
    assert (second.step, second.samples) == (5, 5)
    second.train()
    assert losses(halves) == losses(whole)
    expected, found = weights(whole, 10), weights(halves, 10)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    start = load_file(pretrained / WEIGHTS)
    assert any(not torch.equal(expected[key], start[key]) for key in start)


def test_a_batch_is_as_good_as_accumulated_halves(tmp_path, pretrained):
    # With an epsilon above every gradient a step is in proportion to it: AdamW's own would make a full step of what
    # rounding leaves of a gradient that is zero.
    changes = {"steps": 3, "epsilon": 1.0, "learning_rate": 0.1}
    at_once = consisti2v_settings(tmp_path / "a", pretrained, batch_size=4, **changes)
    in_turn = consisti2v_settings(tmp_path / "b", pretrained, batch_size=2, accumulation=2, **changes)
    train(at_once)
    train(in_turn)
    assert losses(in_turn) == pytest.approx(losses(at_once), rel=1e-4)
    expected, found, start = weights(at_once, 3), weights(in_turn, 3), load_file(pretrained / WEIGHTS)
    moved = max((expected[key] - start[key]).abs().max() for key in start)
    assert moved > 1e-3 and all((found[key] - expected[key]).abs().max() < 1e-3 * moved for key in expected)


def test_the_average_is_saved_and_training_goes_on_from_the_weights(tmp_path, pretrained):
    changes = {"steps": 2, "save_every": 1, "trainable_modules": ["conv_out"]}
    plain = consisti2v_settings(tmp_path / "plain", pretrained, **changes)
    averaged = consisti2v_settings(tmp_path / "averaged", pretrained, ema=True, ema_decay=0.9, **changes)
    train(plain)
    train(averaged)
    first, second = (weights(plain, step)["conv_out.weight"] for step in (1, 2))
    # diffusers' EMAModel takes the first weights as they are, and keeps (1 + n) / (10 + n) of them n updates later
    torch.testing.assert_close(weights(averaged, 1)["conv_out.weight"], first)
    torch.testing.assert_close(weights(averaged, 2)["conv_out.weight"], 2 / 11 * first + 9 / 11 * second)
    resumed = run_of(ConsistI2VTask(averaged))
    assert torch.equal(resumed.network.state_dict()["conv_out.weight"], second)


def test_the_average_of_a_continued_run_is_on_its_device(tmp_path, pretrained):
    settings = consisti2v_settings(
        tmp_path, pretrained, ema=True, steps=1, save_every=1, trainable_modules=["conv_out"]
    )
    run = train(settings)
    run.accelerator.state.device = torch.device("meta")  # accelerate reads states into the memory of the CPU
    run._resume()
    assert {parameter.device.type for parameter in run.ema.shadow_params} == {"meta"}


def test_gradients_are_clipped_and_the_rate_warms_up(tmp_path, pretrained):
    settings = consisti2v_settings(
        tmp_path, pretrained, schedule="constant_with_warmup", warmup_steps=4, steps=6, max_grad_norm=1e-12, epsilon=1.0
    )
    train(settings)
    assert [row["learning_rate"] for row in metrics(settings)] == pytest.approx(
        [1e-3 * share for share in (0, 0.25, 0.5, 0.75, 1, 1)]
    )
    assert all(row["gradient_norm"] > 1e-3 for row in metrics(settings))
    before, after = load_file(pretrained / WEIGHTS), weights(settings, 6)
    # what is left is weight decay, 0.01 of the rate; shares are kept in their range
    before = {key: tensor.clamp(0, 1) if key.endswith(".alpha") else tensor for key, tensor in before.items()}
    assert all(torch.allclose(after[key], before[key], rtol=1e-4, atol=1e-6) for key in before)


def test_16_bits_learn_nearly_what_32_learn(tmp_path, pretrained):
    runs = []
    for precision in ("fp32", "bf16"):
        # PyTorch's gradient of a convolution over a single pixel is not always a number in bf16 on a CPU
        changes = {"mixed_precision": precision, "data": data_settings(width=64, height=64)}
        settings = consisti2v_settings(tmp_path / precision, pretrained, steps=3, **changes)
        train(settings, NumberedClips(side=64))
        runs.append(settings)
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=0.03)
    assert losses(runs[1]) != losses(runs[0])
    # the weights themselves are kept in 32 bits
    start, after = load_file(pretrained / WEIGHTS), weights(runs[1], 3)
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    changed = torch.cat([(after[key] - start[key]).abs().flatten() for key in start])
    # three steps of Adam, each of the learning rate at most
    assert 0 < changed.median() < 3.1e-3


def test_a_tracker_that_is_not_installed_is_an_error(tmp_path, pretrained, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    settings = consisti2v_settings(tmp_path, pretrained, tracker="wandb")
    with pytest.raises(ImportError, match="The tracker wandb is not installed. Install it"):
        engine.start(settings)


def test_an_output_that_is_a_file_is_an_error(tmp_path, pretrained):
    (tmp_path / "run").touch()
    with pytest.raises(ValueError, match="output: the folder .*run cannot be made"):
        engine.start(consisti2v_settings(tmp_path / "run", pretrained))


def test_only_the_newest_checkpoints_are_kept(tmp_path, pretrained):
    settings = consisti2v_settings(tmp_path, pretrained, save_every=1, steps=4, keep=2)
    folder = tmp_path / "checkpoints"
    for name in ("step-00000001", "step-00000003.unfinished", "step-by-step notes"):
        (folder / name).mkdir(parents=True)
    train(settings)
    assert [path.name for path in checkpoints.complete(folder)] == ["step-00000003", "step-00000004"]
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["step-00000003", "step-00000004", "step-by-step notes"]


def test_a_loss_that_is_no_number_ends_the_run(tmp_path, pretrained):
    class Broken(NumberedClips):
        def __getitem__(self, number):
            sample = super().__getitem__(number)
            if number == 6:
                sample.frames.fill_(float("nan"))
            return sample

    settings = consisti2v_settings(tmp_path, pretrained)
    with pytest.raises(ValueError, match="The loss of step 7 is nan, .* Start again with a lower learning_rate"):
        train(settings, Broken())
    assert [path.name for path in checkpoints.complete(tmp_path / "checkpoints")] == ["step-00000005"]


def test_a_gradient_that_is_no_number_is_not_saved(tmp_path, pretrained):
    class Steep(ConsistI2VTask):
        def loss(self, network, samples):
            weight = self.network.conv_out.weight
            endless = (weight * 0).sum().sqrt() if samples[0].number == 4 else 0
            return super().loss(network, samples) + endless

    settings = consisti2v_settings(tmp_path, pretrained, save_every=1)
    with pytest.raises(ValueError, match=r"The loss of step 5 is [\d.]+, its gradient nan long"):
        run_of(Steep(settings)).train()
    assert checkpoints.complete(tmp_path / "checkpoints")[-1].name == "step-00000004"
    assert metrics(settings)[-1]["gradient_norm"] is None


def test_a_run_told_to_stop_while_it_validates_saves(tmp_path, pretrained):
    class StoppedWhileValidating(ConsistI2VTask):
        def validate(self, weights, folder):
            os.kill(os.getpid(), signal.SIGTERM)
            return super().validate(weights, folder)

    settings = consisti2v_settings(tmp_path, pretrained, validate_every=2, save_every=10)
    run = run_of(StoppedWhileValidating(settings))
    run.train()
    assert run.step == 3
    assert [path.name for path in checkpoints.complete(tmp_path / "checkpoints")] == ["step-00000003"]


def test_a_continued_run_takes_its_own_settings(tmp_path, pretrained):
    train(consisti2v_settings(tmp_path, pretrained, steps=2, schedule="linear"))
    changes = {"learning_rate": 1e-5, "weight_decay": 0.5, "betas": (0.8, 0.9), "epsilon": 1e-6}
    settings = consisti2v_settings(tmp_path, pretrained, steps=4, schedule="linear", **changes)
    run = train(settings)
    assert [row["learning_rate"] for row in metrics(settings)][2:] == pytest.approx([1e-5 * 2 / 4, 1e-5 / 4])
    group = run.optimizer.param_groups[0]
    assert (group["weight_decay"], group["betas"], group["eps"]) == (0.5, (0.8, 0.9), 1e-6)


def test_accumulation_may_change_in_a_continued_run(tmp_path, pretrained):
    norms = []
    for name, changes in (("batch", {"batch_size": 3}), ("turns", {"accumulation": 3})):
        train(consisti2v_settings(tmp_path / name, pretrained, steps=1))
        settings = consisti2v_settings(tmp_path / name, pretrained, steps=2, **changes)
        train(settings)
        norms.append(metrics(settings)[-1]["gradient_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "scheduler.bin", "../progress.json"])
def test_a_damaged_checkpoint_is_named(tmp_path, pretrained, name):
    settings = consisti2v_settings(tmp_path, pretrained, steps=1)
    train(settings)
    path = tmp_path / "checkpoints" / "step-00000001" / checkpoints.STATE / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="step-00000001 is damaged .* Delete this folder"):
        run_of(ConsistI2VTask(settings))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ema": True}, "by a run with ema False, this one has True"),
        ({"trainable_modules": ["conv_out"]}, "by a run with trained_parameters .*, this one has"),
    ],
)
def test_a_run_with_other_parameters_is_refused(tmp_path, pretrained, changes, words):
    train(consisti2v_settings(tmp_path, pretrained, steps=1))
    with pytest.raises(ValueError, match=words):
        run_of(ConsistI2VTask(consisti2v_settings(tmp_path, pretrained, **changes)))


def test_another_trainers_checkpoints_are_left_alone(tmp_path, pretrained):
    settings = consisti2v_settings(tmp_path, pretrained, steps=1)
    train(settings)
    with pytest.raises(ValueError, match="by a run with trainer consisti2v, this one has motion_predictor"):
        run_of(ConsistI2VTask(settings), trainer="motion_predictor")


def test_a_finished_run_does_nothing_more(tmp_path, pretrained):
    settings = consisti2v_settings(tmp_path, pretrained, steps=1)
    train(settings)
    saved = (tmp_path / "checkpoints" / "step-00000001" / WEIGHTS).stat()
    train(settings)
    assert (tmp_path / "checkpoints" / "step-00000001" / WEIGHTS).stat() == saved
    assert len(losses(settings)) == 1


KILLED = """
import os, signal, sys
sys.path[:0] = [{tests!r}, {scripts!r}]
from comfy_process import enter
enter()
from pathlib import Path
from training_runs import consisti2v_settings, run_of
from consistent_video.training.consisti2v import ConsistI2VTask

class KilledWhileSaving(ConsistI2VTask):
    def save(self, folder, weights):
        super().save(folder, weights)
        if folder.name.startswith("step-00000004"):
            os.kill(os.getpid(), signal.SIGKILL)

settings = consisti2v_settings(Path(sys.argv[1]), Path(sys.argv[2]), save_every=2, steps=6)
run_of(KilledWhileSaving(settings)).train()
"""


def test_kill_while_saving_leaves_the_last_checkpoint(tmp_path, pretrained):
    script = KILLED.format(tests=str(REPOSITORY / "tests"), scripts=str(REPOSITORY / "scripts"))
    folder = tmp_path / "run"
    result = subprocess.run(
        [sys.executable, "-c", script, folder, pretrained], capture_output=True, encoding="utf-8", check=False
    )
    assert result.returncode == -signal.SIGKILL, result.stderr
    left = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert left == ["step-00000002", "step-00000004.unfinished"]
    settings = consisti2v_settings(folder, pretrained, save_every=2, steps=6)
    run = run_of(ConsistI2VTask(settings))
    assert run.step == 2
    run.train()
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000004", "step-00000006"]
    untroubled = consisti2v_settings(tmp_path / "untroubled", pretrained, save_every=6, steps=6)
    train(untroubled)
    expected, found = weights(untroubled, 6), weights(settings, 6)
    assert all(torch.equal(expected[key], found[key]) for key in expected)
