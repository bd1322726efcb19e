"""Methods of ComfyUI's classes that the pack overrides pass on what a newer ComfyUI may add to them."""

import ast
import importlib
import inspect
import re
import textwrap
import types

import comfy.samplers
import comfy.sd1_clip
import comfy.weight_adapter.lora
import pytest
import tiny_consisid
import torch

import tiny_checkpoints
from comfy_process import REPOSITORY
from consistent_video.loaders.checkpoint import load_folder
from consistent_video.loaders.families import FAMILIES
from consistent_video.loaders.lora import DiffusersLoRAAdapter
from consistent_video.samplers.filters import LowPass
from consistent_video.samplers.free_init import FreeInit
from consistent_video.samplers.guidance import ImageTextGuider

PACK = "consistent_video"
FOLDERS = ("faces", "loaders", "models", "nodes", "patches", "samplers", "story")
NAMES = {
    "modelscope": tiny_checkpoints.MODELSCOPE_NAME,
    "i2vgenxl": tiny_checkpoints.I2VGENXL_NAME,
    "consisti2v": tiny_checkpoints.CONSISTI2V_NAME,
    "consisid": tiny_consisid.CONSISID_NAME,
}
LATENT, CLIP_LATENT, CLIP = torch.zeros(1, 4, 2, 8, 8), torch.zeros(1, 16, 2, 8, 8), torch.zeros(5, 64, 64, 3)
UNKNOWN = "added_by_a_newer_comfyui"


class ReachedError(Exception):
    """ComfyUI's own method was called with the unknown keyword."""


@pytest.fixture(scope="module")
def loaded(models_folder):
    """Family name -> its MODEL, CLIP and VAE."""
    return {
        name: load_folder(FAMILIES[name], models_folder / "diffusers" / folder, "default")
        for name, folder in NAMES.items()
    }


@pytest.fixture(scope="module")
def classes(loaded):
    """All classes of the pack, those included that are made while a checkpoint is loaded."""
    for folder in FOLDERS:
        for path in (REPOSITORY / folder).glob("*.py"):
            importlib.import_module(f"{PACK}.{folder}" if path.stem == "__init__" else f"{PACK}.{folder}.{path.stem}")
    return sorted({cls for cls in below(object) if str(cls.__module__).startswith(f"{PACK}.")}, key=name_of)


def below(cls: type) -> set[type]:
    """The subclasses of a class, theirs, and so on."""
    found, todo = set(), [cls]
    while todo:
        fresh = set(type.__subclasses__(todo.pop())) - found
        found |= fresh
        todo += fresh
    return found


def function_of(cls: type, name: str) -> types.FunctionType | None:
    """The function behind a method that a class defines itself."""
    found = vars(cls).get(name)
    found = (
        found.__func__ if isinstance(found, staticmethod | classmethod) else inspect.unwrap(found) if found else None
    )
    return found if isinstance(found, types.FunctionType) else None


def name_of(cls: type) -> str:
    """Module and name of a class, without the names of packages and functions around it."""
    return f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}"


def of_comfyui(cls: type) -> bool:
    return cls.__module__.split(".")[0] == "comfy"


def overrides(classes: list[type]) -> dict[str, tuple[types.FunctionType, type]]:
    """ "module.Class.method" -> the pack's function, and the class of ComfyUI that defines what it overrides.

    Constructors count where ComfyUI calls them: for text encoders and tokenizers.
    """
    found = {}
    for cls in classes:
        for name in vars(cls):
            function = function_of(cls, name)
            base = next((base for base in cls.__mro__ if of_comfyui(base) and function_of(base, name)), None)
            if function is None or base is None or name == "__init__" and not base.__module__.endswith("sd1_clip"):
                continue
            found[f"{name_of(cls)}.{name}"] = (function, base)
    return found


def calls_super(code: types.CodeType) -> bool:
    """Whether a function, or one inside it, names `super`."""
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return "super" in code.co_names or any(map(calls_super, inner))


def hands_on(function: types.FunctionType) -> bool:
    """Whether each call of what a function overrides has `**` and something in it."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    upwards = [call for call in calls if re.fullmatch(rf"super\(.*\)\.{function.__name__}", ast.unparse(call.func))]
    return all(any(entry.arg is None for entry in call.keywords) for call in upwards)


def sample_calls(loaded) -> dict:
    """ "module.Class.method" -> a call of it with the unknown keyword, for those that end in ComfyUI's own method."""
    unknown = {UNKNOWN: 1}
    models = {name_of(type(model.model)): model.model for model, _, _ in loaded.values()}
    frame_vae, clip_vae = loaded["modelscope"][2], loaded["consisid"][2]
    guider = ImageTextGuider(loaded["modelscope"][0])
    guider.conds = {}
    vaes = {name_of(type(vae)): (vae, latent) for vae, latent in ((frame_vae, LATENT), (clip_vae, CLIP_LATENT))}
    calls = {
        f"{name}.extra_conds": lambda model=model: model.extra_conds(
            noise=torch.zeros(1, model.latent_format.latent_channels, 2, 8, 8), **unknown
        )
        for name, model in models.items()
    }
    for name, (vae, latent) in vaes.items():
        calls[f"{name}.decode"] = lambda vae=vae, latent=latent: vae.decode(latent, **unknown)
        calls[f"{name}.decode_tiled"] = lambda vae=vae, latent=latent: vae.decode_tiled(latent, **unknown)
        calls[f"{name}.encode"] = lambda vae=vae: vae.encode(CLIP, **unknown)
        calls[f"{name}.encode_tiled"] = lambda vae=vae: vae.encode_tiled(CLIP, **unknown)
    key = "mid_block.attentions.0.proj_in"
    calls |= {
        "cogvideox_vae.CogVideoXVAE.vae_encode_crop_pixels": lambda: clip_vae.vae_encode_crop_pixels(CLIP, **unknown),
        "consisti2v.ConsistI2VModel._apply_model": lambda: models["consisti2v.ConsistI2VModel"]._apply_model(
            LATENT, None, clean_first_frame=LATENT[:, :, :1], **unknown
        ),
        "guidance.ImageTextGuider.set_conds": lambda: guider.set_conds([], [], **unknown),
        "guidance.ImageTextGuider.inner_sample": lambda: guider.inner_sample(
            LATENT, LATENT, None, None, torch.ones(2), **unknown
        ),
        "guidance.ImageTextGuider.predict_noise": lambda: guider.predict_noise(LATENT, None, **unknown),
        "lora.DiffusersLoRAAdapter.load": lambda: DiffusersLoRAAdapter.load(
            f"diffusion_model.{key}", {}, None, None, set(), **unknown
        ),
    }
    for family in ("modelscope", "consisid"):
        clip = loaded[family][1]
        encoder, tokenizer = clip.cond_stage_model, clip.tokenizer
        reader = getattr(tokenizer, tokenizer.clip)
        for cls in map(type, (encoder, getattr(encoder, encoder.clip), tokenizer, reader)):
            calls[f"{name_of(cls)}.__init__"] = lambda cls=cls: cls(**unknown)
        calls[f"{name_of(type(reader))}.tokenize_with_weights"] = lambda reader=reader: reader.tokenize_with_weights(
            "a", **unknown
        )
    return calls


def test_every_override_takes_keywords_that_it_does_not_know(classes):
    found = overrides(classes)
    assert len(found) > 20 and {"frame_vae.FrameVAE.encode", "t5_text_encoder.TextModel.__init__"} <= set(found)
    refusing = [
        name
        for name, (function, _) in found.items()
        if not any(entry.kind is entry.VAR_KEYWORD for entry in inspect.signature(function).parameters.values())
    ]
    assert refusing == []


def test_every_override_hands_them_on(classes, loaded, monkeypatch):
    calls, found = sample_calls(loaded), overrides(classes)
    assert [name for name, (function, _) in found.items() if not hands_on(function)] == []
    for name in sorted(name for name in calls if name in found and calls_super(found[name][0].__code__)):
        method, base = name.rpartition(".")[2], found[name][1]

        def reached(*arguments, **options):
            if options.get(UNKNOWN) == 1:
                raise ReachedError

        is_class_method = isinstance(vars(base)[method], classmethod)
        with monkeypatch.context() as patch, torch.inference_mode():
            patch.setattr(base, method, classmethod(reached) if is_class_method else reached)
            with pytest.raises(ReachedError):
                calls[name]()
                pytest.fail(f"{name} keeps the keyword to itself")


@pytest.mark.parametrize("family", NAMES)
def test_what_a_newer_comfyui_asks_does_not_change_the_answer(loaded, family):
    model = loaded[family][0].model
    shape = (2, model.latent_format.latent_channels, 5, 32, 32)
    assert model.memory_required(shape, **{UNKNOWN: 1}) == model.memory_required(shape) > 0
    assert model.get_dtype(**{UNKNOWN: 1}) == model.get_dtype()


def test_free_init_hands_keywords_to_the_sampler_of_each_run(loaded):
    seen = []

    class Recorder(comfy.samplers.Sampler):
        def sample(self, model_wrap, sigmas, extra_args, callback, noise, *arguments, **options):
            seen.append(options.get(UNKNOWN))
            return noise

    wrap = comfy.samplers.CFGGuider(loaded["modelscope"][0])
    wrap.inner_model, wrap.conds = loaded["modelscope"][0].model, {}
    low_pass = LowPass()
    sampler = FreeInit(Recorder(), 2, False, low_pass)
    sampler.sample(
        wrap, torch.tensor([14.0, 1.0, 0.0]), {"seed": 0}, None, LATENT + 1, disable_pbar=True, **{UNKNOWN: 1}
    )
    assert seen == [1, 1]
