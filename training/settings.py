"""What a run is told: a YAML file, changed by `key=value` from the command line, checked before anything is loaded."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator


def _expand(path: Path) -> Path:
    return path.expanduser()


FilePath = Annotated[Path, AfterValidator(_expand)]


class Section(BaseModel):
    """A group of fields; unknown ones are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SourceSettings(Section):
    """One folder of videos with its captions."""

    annotations: FilePath = Field(description='JSON lines, one per video: {"file": ..., "text": ...}')
    folder: FilePath = Field(description="folder that `file` is relative to")
    captions: FilePath | None = Field(
        None,
        description='JSON lines {"id": ..., "text": ...} when the captions are kept apart; annotations then have ids',
    )


class DataSettings(Section):
    """The clips."""

    sources: list[SourceSettings] = Field(min_length=1, description="folders of videos, each with its annotations")
    frames: int = Field(16, ge=2, le=512, description="frames of a clip")
    width: int = Field(256, ge=8, multiple_of=8, description="pixels")
    height: int = Field(256, ge=8, multiple_of=8, description="pixels")
    strides: tuple[int, int] = Field(
        (1, 5), description="shortest and longest distance between two frames of a clip, in frames of the video"
    )
    flip: float = Field(0.5, ge=0, le=1, description="share of the clips that are mirrored")
    crop: Literal["center", "random"] = Field("center", description="which part of a video with another shape is taken")
    workers: int = Field(4, ge=0, description="processes that decode videos, per training process")

    @model_validator(mode="after")
    def _strides_ascend(self):
        if not 1 <= self.strides[0] <= self.strides[1]:
            raise ValueError(f"strides {list(self.strides)}: expected two numbers from 1 up, the smaller one first")
        return self


class RunSettings(Section):
    """What every trainer has."""

    output: FilePath = Field(description="folder of the run; a run that finds its checkpoints there continues")
    data: DataSettings = Field(description="the clips")
    seed: int = Field(42, ge=0, description="of every random choice")
    steps: int = Field(200_000, ge=1, description="changes of the weights")
    batch_size: int = Field(3, ge=1, description="clips per process at a time")
    accumulation: int = Field(1, ge=1, description="batches that are summed before the weights change")
    learning_rate: float = Field(5e-5, gt=0, description="of AdamW")
    schedule: Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"] = (
        Field("constant", description="how the learning rate changes, as named by diffusers")
    )
    warmup_steps: int = Field(0, ge=0, description="steps until the learning rate is reached; not with `constant`")
    betas: tuple[float, float] = Field((0.9, 0.999), description="of AdamW")
    weight_decay: float = Field(0.01, ge=0, description="of AdamW")
    epsilon: float = Field(1e-8, gt=0, description="of AdamW")
    max_grad_norm: float = Field(0.5, gt=0, description="longer gradients are shortened to this")
    mixed_precision: Literal["fp32", "fp16", "bf16"] = Field("bf16", description="type of the computation")
    ema: bool = Field(False, description="keep an exponential moving average of the weights, and save that")
    ema_decay: float = Field(0.9999, gt=0, lt=1, description="share of the average that a step keeps")
    save_every: int = Field(2000, ge=1, description="steps between checkpoints")
    keep: int = Field(3, ge=1, description="checkpoints that are kept; older ones are deleted")
    save_dtype: Literal["fp32", "fp16", "bf16"] = Field("fp32", description="type of the weights for the graph")
    validate_every: int = Field(1000, ge=0, description="steps between validations; 0: none")
    tracker: Literal["tensorboard", "wandb", "none"] = Field("tensorboard", description="where the curves go")

    @model_validator(mode="after")
    def _warmup_has_a_schedule(self):
        if self.warmup_steps and self.schedule == "constant":
            raise ValueError("warmup_steps do nothing with the schedule constant: choose constant_with_warmup")
        return self


class NoiseSettings(Section):
    """What the frames' noise has in common; see Shared Noise in the graph."""

    mode: Literal["independent", "mixed", "progressive"] = Field("mixed", description="as of Shared Noise")
    alpha: float = Field(1.0, ge=0, description="how much of it is shared")


class ValidationClip(Section):
    """A clip that is drawn to look at."""

    prompt: str = Field(description="text of the clip")
    first_frame: FilePath = Field(description="picture that it begins with")


class ConsistI2VValidation(Section):
    """How validation clips are drawn."""

    clips: list[ValidationClip] = Field([], description="what is drawn")
    negative: str = Field("", description="text of the other branch")
    steps: int = Field(50, ge=1, description="of Reference Scheduler")
    cfg_text: float = Field(7.5, ge=0, description="of Image and Text Guider")
    cfg_image: float = Field(1.0, ge=0, description="of Image and Text Guider")
    frame_stride: int = Field(3, ge=1, le=60, description="of ConsistI2V Conditioning")
    frame_init: int | None = Field(850, ge=0, le=999, description="noise level of FrameInit Noise; null: without it")
    seed: int = Field(0, ge=0, description="of the noise")


class ConsistI2VSettings(RunSettings):
    """Trainer `consisti2v`."""

    pretrained: FilePath = Field(
        description="ConsistI2V folder to go on from, or a Stable Diffusion 2.1-base folder (diffusers) to begin with"
    )
    trainable_modules: list[str] = Field(
        ["all"],
        min_length=1,
        description="all, or parts of names such as conv3ds. and tempo_attns.; others are frozen",
    )
    drop_text: float = Field(0.1, ge=0, le=1, description="share of the clips whose text is left empty")
    drop_first_frame: float = Field(0.1, ge=0, le=1, description="share of the clips whose first frame is noisy")
    noise: NoiseSettings = Field(NoiseSettings(), description="noise of the clips")
    gradient_checkpointing: bool = Field(True, description="compute activations twice to keep fewer of them")
    validation: ConsistI2VValidation = Field(ConsistI2VValidation(), description="clips that are drawn to look at")


class PredictorSettings(Section):
    """Sizes of a motion predictor that is trained from nothing."""

    image_tokens: int = Field(16, ge=0, description="tokens per picture beside its embedding")
    hidden_size: int = Field(1024, ge=4, description="width of the transformer")
    num_layers: int = Field(8, ge=1, description="blocks of the transformer")
    num_attention_heads: int = Field(12, ge=1, description="heads of each block")
    attention_head_dim: int = Field(64, ge=1, description="width of a head")
    feed_forward_multiplier: int = Field(4, ge=1, description="hidden width of each block, in widths")
    image_token_layers: int = Field(4, ge=1, description="blocks of the network that makes the tokens per picture")
    max_frames: int = Field(32, ge=2, description="longest clip")


class MotionPredictorSettings(RunSettings):
    """Trainer `motion_predictor`."""

    i2vgenxl: FilePath = Field(description="I2VGen-XL folder, whose vision tower embeds the frames")
    pretrained: FilePath | None = Field(None, description="motion predictor to go on from; its file gives the sizes")
    predictor: PredictorSettings = Field(PredictorSettings(), description="sizes of a new one")
    embedding_loss: float = Field(1.0, ge=0, description="weight of the error of the frames' embeddings")
    video_loss: float = Field(0.0, ge=0, description="weight of the frozen video network's error; above 0 it is loaded")
    fps: int = Field(8, ge=1, le=120, description="frame rate that the video network is told")
    held_out: list[SourceSettings] = Field([], description="videos that are only measured, against interpolation")
    held_out_clips: int = Field(64, ge=1, description="clips of them that a validation measures")
    learning_rate: float = Field(1e-4, gt=0, description="of AdamW")
    steps: int = Field(100_000, ge=1, description="changes of the weights")
    max_grad_norm: float = Field(1.0, gt=0, description="longer gradients are shortened to this")

    @model_validator(mode="after")
    def _some_loss(self):
        if self.embedding_loss == self.video_loss == 0:
            raise ValueError("embedding_loss and video_loss are both 0: there is nothing to learn from")
        return self


def read_settings(kind: type[RunSettings], path: Path, overrides: Sequence[str] = ()) -> RunSettings:
    """The settings of a run.

    Args:
        kind: the trainer's settings.
        path: YAML file; relative paths in it are relative to the working directory.
        overrides: `key=value`, where key may lead into a section (`data.frames=8`) and value is YAML.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no YAML, an override without `=`, or a field that is missing, unknown or out of range.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} was not found. Give the YAML file of the run.")
    values = _parse(path.read_bytes(), str(path)) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a YAML {type(values).__name__}, expected fields with values.")
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise ValueError(f"{override!r} is no override. Write key=value, for example steps=1000.")
        _put(values, key.split("."), _parse(value, override), override)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        faults = "\n".join(f"  {_where(fault['loc'])}: {_what(fault)}" for fault in error.errors())
        source = f"{path} with {' '.join(overrides)}" if overrides else path
        raise ValueError(f"{source} does not describe a run:\n{faults}") from error


def describe(kind: type[BaseModel], prefix: str = "") -> list[tuple[str, str, str]]:
    """Every field of some settings: its key, its default ("required" when there is none) and what it means."""
    rows = []
    for name, field in kind.model_fields.items():
        section = _section(field.annotation)
        if section is None or field.annotation is not section:
            default = "required" if field.is_required() else yaml_text(field.get_default(call_default_factory=True))
            rows.append((prefix + name, default, field.description))
        if section is not None:
            inner = "" if field.annotation is section else "[]"
            rows += describe(section, f"{prefix}{name}{inner}.")
    return rows


def yaml_text(value) -> str:
    """A value as one line of YAML."""
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    plain = list(plain) if isinstance(plain, tuple) else plain
    text = yaml.safe_dump(plain, default_flow_style=True, width=10_000).strip()
    return text.removesuffix("...").strip()


def _section(annotation) -> type[Section] | None:
    """The section that a field is, or holds a list of."""
    candidates = (annotation, *getattr(annotation, "__args__", ()))
    return next((part for part in candidates if isinstance(part, type) and issubclass(part, Section)), None)


def _parse(text: str | bytes, source: str):
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{source} is not valid YAML: {error}") from error


def _put(values: dict, keys: list[str], value, override: str) -> None:
    for key in keys[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise ValueError(f"{override!r}: {key} is not a section. Lists are changed as a whole, as key=[...].")
    values[keys[-1]] = value


def _where(location: tuple) -> str:
    return ".".join(map(str, location)) or "settings"


def _what(fault: dict) -> str:
    return "there is no such field; --help lists them" if fault["type"] == "extra_forbidden" else fault["msg"]
