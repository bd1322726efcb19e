"""ConsisID on a device that cannot hold all of its weights: parts of them move, and the clip is the same."""

import comfy.model_management
import pytest
import test_memory_budget
import tiny_consisid
import torch
from test_consisid_parity import portrait

from consistent_video.loaders import checkpoint
from consistent_video.loaders.families import CONSISID
from consistent_video.models import consisid_conditioning
from consistent_video.samplers import reference, schedules
from native_sampling import conditioning, sample

DEVICE, SMALL_GRAPH = test_memory_budget.DEVICE, test_memory_budget.SMALL_GRAPH
SIDE, FRAMES, STEPS = 64, 5, 3

held, whole_budget = test_memory_budget.held, test_memory_budget.budget


@pytest.fixture
def budget(whole_budget, monkeypatch):
    """A function that gives the device so many bytes; networks that do not fit are loaded in part."""
    monkeypatch.setattr(comfy.model_management, "is_device_cpu", lambda device: device == torch.device("cpu"))
    monkeypatch.setattr(comfy.model_management, "vram_state", comfy.model_management.VRAMState.NORMAL_VRAM)
    yield whole_budget
    unload()


def unload():
    # Unloading all models leaves out devices that ComfyUI does not list.
    comfy.model_management.free_memory(1e30, DEVICE)
    assert held() == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_consisid.write_consisid(
        tmp_path_factory.mktemp("consisid") / "checkpoint", use_learned_positional_embeddings=False
    )


@pytest.fixture(scope="module")
def loaded(folder):
    """MODEL, CLIP and VAE on the device with a budget."""
    model, clip, vae = checkpoint.load_folder(CONSISID, folder, "default")
    for patcher in (model, clip.patcher, vae.patcher):
        patcher.load_device = DEVICE
    return model, clip, vae


def prompts(clip, vae):
    texts = (conditioning(clip, text) for text in ("a woman waves", ""))
    return consisid_conditioning.condition_prompts(*texts, vae, *portrait(), *tiny_consisid.face(), SIDE, SIDE)


def noise():
    shape = (1, 16, (FRAMES - 1) // 4 + 1, SIDE // 8, SIDE // 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def run(model, both, **kwargs):
    sigmas = schedules.reference_sigmas(model.model.scheduler_config, STEPS)
    return sample(model, *both, noise(), reference.reference_sampler(), sigmas, cfg=6.0, **kwargs)


INPUTS = ("patch_embed.proj", "patch_embed.text_proj", "local_facial_extractor.id_embedding_mapping.0")
BLOCKS = ("transformer_blocks.1.attn1.to_q", "transformer_blocks.2.ff.net.2", "perceiver_cross_attention.0.to_kv")


def changes(model):
    """Patches of weights as a LoRA of diffusers' keys makes them."""
    generator = torch.Generator().manual_seed(1)
    state = model.model.diffusion_model.state_dict()
    keys = [f"{layer}.weight" for layer in (*INPUTS, *BLOCKS)]
    return {
        f"diffusion_model.{key}": ("diff", (0.1 * torch.randn(state[key].shape, generator=generator),)) for key in keys
    }


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("share", [0.05, 0.6])
def test_a_clip_is_the_same_with_a_part_of_the_weights_on_the_device(loaded, budget, share, patched):
    model, clip, vae = loaded
    both = prompts(clip, vae)
    budget(2**40)
    plain = run(model, both)
    if patched:
        model = model.clone()
        model.add_patches(changes(model))
    expected = run(model, both)
    assert model.loaded_size() == model.model_size()
    assert patched == ((expected - plain).abs().max() > 0.01)
    unload()
    size = int(share * model.model_size()) + SMALL_GRAPH
    budget(size)
    loads = []
    found = run(model, both, callback=lambda *_: loads.append((model.loaded_size(), held())))
    assert len(loads) == STEPS and all(whole <= size for _, whole in loads)
    assert all(part < share * model.model_size() for part, _ in loads)
    assert share < 0.5 or loads[0][0] > 0
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("graphs", [2.5, 1.5])
def test_text_encoder_autoencoder_and_network_take_turns(loaded, budget, graphs):
    model, clip, vae = loaded
    patchers = (clip.patcher, vae.patcher, model)
    shares = []

    def note(*_):
        shares.append([patcher.loaded_size() / patcher.model_size() for patcher in patchers])
        assert held() <= size

    def frames():
        both = prompts(clip, vae)
        note()
        latents = run(model, both, callback=note)
        images = vae.decode(latents)
        note()
        return images

    size = 2**40
    budget(size)
    whole = frames()
    assert whole.shape == (1, FRAMES, SIDE, SIDE, 3) and shares[-1] == [1, 1, 1]
    unload()
    shares.clear()
    size = int(graphs * SMALL_GRAPH)
    assert size < sum(patcher.model_size() for patcher in patchers)
    budget(size)
    found = frames()
    _, *during, after = shares
    # The text encoder has made room for the network.
    assert len(during) == STEPS and all(text == 0 and network > 0.9 for text, _, network in during)
    assert after[1] > 0
    # With the least room no weights are whole on the device, not even one at a time.
    assert graphs > 2 or max(map(max, shares)) < 1
    assert (found - whole).abs().max() < 1e-5
