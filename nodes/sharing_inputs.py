"""The widgets of nodes whose panels see each other's tokens."""

from comfy_api.latest import io

from ..patches import token_sharing

MAX_STEP = 10000


def rate_inputs() -> list:
    """The widgets of both sampling rates."""
    return [
        io.Float.Input(
            "sampling_rate_32",
            default=0.5,
            min=0.0,
            max=1.0,
            step=0.05,
            tooltip="Share of the other panels' tokens that a panel sees in layers whose tokens are 32 pixels or more: "
            "what is in the picture. 0.3 is weak, 0.5 published.",
        ),
        io.Float.Input(
            "sampling_rate_64",
            default=0.5,
            min=0.0,
            max=1.0,
            step=0.05,
            tooltip="The same in finer layers (tokens of 16 pixels and less): what it looks like in detail.",
        ),
    ]


def schedule_inputs(optional: bool = False) -> list:
    """The widgets that say at which steps panels see each other."""
    return [
        io.Int.Input(
            "start_step",
            default=1,
            min=0,
            max=MAX_STEP,
            optional=optional,
            advanced=optional,
            tooltip="First step at which panels see each other; steps count from 0.",
        ),
        io.Float.Input(
            "plain_probability_early",
            default=0.3,
            min=0.0,
            max=1.0,
            step=0.05,
            optional=optional,
            advanced=optional,
            tooltip="Probability that a layer is left as it is, before late_step. Higher: more variety, less likeness.",
        ),
        io.Float.Input(
            "plain_probability_late",
            default=0.1,
            min=0.0,
            max=1.0,
            step=0.05,
            optional=optional,
            advanced=optional,
            tooltip="Probability that a layer is left as it is, from late_step on.",
        ),
        io.Int.Input(
            "late_step",
            default=20,
            min=0,
            max=MAX_STEP,
            optional=optional,
            advanced=optional,
            tooltip="Step from which plain_probability_late holds.",
        ),
    ]


def variant_inputs() -> list:
    """The widgets that choose between the published generations."""
    return [
        io.Combo.Input(
            "step_unit",
            options=list(token_sharing.CHOICES["unit"]),
            default="steps",
            optional=True,
            advanced=True,
            tooltip="steps: start_step and late_step are step numbers, as published. fractions: they are meant for 50 "
            "steps and move with the number of steps.",
        ),
        io.Combo.Input(
            "token_count",
            options=list(token_sharing.CHOICES["count"]),
            default="fixed",
            optional=True,
            advanced=True,
            tooltip="fixed: as many tokens of every panel. random: each token by itself, as published.",
        ),
        io.Combo.Input(
            "warm_up",
            options=list(token_sharing.CHOICES["warm_up"]),
            default="plain",
            optional=True,
            advanced=True,
            tooltip="Before start_step. plain: panels do not see each other. full_bank: panels that read a character "
            "bank see all of it, as in the first published demo; the bank grows by those steps.",
        ),
    ]
