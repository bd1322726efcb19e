"""Delayed conditioning of PhotoMaker: the first steps lay out the picture from the text alone, then the person joins.

Source: TencentARC/PhotoMaker, pipeline.py (`start_merge_step`).
"""

import numpy
import torch

# Where between two steps the conditionings change, as a fraction of their distance above the lower sigma: low, so that
# samplers which look ahead within a step still see the conditioning of the step they began with.
POSITION = 0.01


def delayed(text_only: list, merged: list, merge_start: float, sigmas: torch.Tensor | None) -> list:
    """One CONDITIONING entry for the early steps and one for the rest.

    With sigmas the change lies where the published code has it: steps 0 to int(merge_start * steps) see the text alone.
    The two ranges leave no gap and do not overlap. Without sigmas it lies at that share of the model's schedule, as of
    ConditioningSetTimestepRange, and then 0 means the person from the first step on.

    Args:
        text_only, merged: CONDITIONING entries, [embeddings, options].
        merge_start: 0..1.
        sigmas: (steps + 1,) as given to the sampler, descending.

    Raises:
        ValueError: merge_start out of range, or sigmas that are no schedule.
    """
    if not 0 <= merge_start <= 1:
        raise ValueError(f"merge_start is {merge_start}, expected a share of the steps, 0 to 1.")
    if sigmas is None:
        return _by_share(text_only, merged, merge_start)
    lowest_text = last_text_sigma(sigmas, merge_start)
    if lowest_text is None:
        return [text_only]
    below = float(numpy.nextafter(numpy.float32(lowest_text), numpy.float32(0)))
    return [_with(text_only, timestep_end=lowest_text), _with(merged, timestep_start=below)]


def last_text_sigma(sigmas: torch.Tensor, merge_start: float) -> float | None:
    """The sigma (an fp32 value) down to which the text alone is seen; None when no step is left for the person.

    It lies strictly between the last step of the text alone and the next.

    Raises:
        ValueError: sigmas that are no schedule.
    """
    check_schedule(sigmas)
    steps = sigmas.flatten().tolist()[:-1]
    last = steps[min(int(merge_start * len(steps)), len(steps) - 1)]
    following = next((sigma for sigma in steps if sigma < last), None)
    if following is None:
        return None
    above = numpy.nextafter(numpy.float32(following), numpy.float32(last))
    return float(max(above, numpy.float32(following + POSITION * (last - following))))


def check_schedule(sigmas: torch.Tensor) -> None:
    """Raise ValueError unless these are descending, finite sigmas of at least one step."""
    valid = sigmas.ndim == 1 and len(sigmas) > 1 and bool(sigmas.isfinite().all())
    if not valid or bool((sigmas.diff() > 0).any()) or sigmas[-1] < 0 or sigmas[0] <= 0:
        shown = ", ".join(f"{sigma:g}" for sigma in sigmas.flatten().tolist()[:4])
        raise ValueError(
            f"The sigmas ({tuple(sigmas.shape)}: {shown}, ...) are no schedule, expected two or more falling values. "
            "Connect the output of a scheduler node."
        )


def _by_share(text_only: list, merged: list, merge_start: float) -> list:
    if merge_start == 0:
        return [merged]
    if merge_start == 1:
        return [text_only]
    return [
        _with(text_only, start_percent=0.0, end_percent=merge_start),
        _with(merged, start_percent=merge_start, end_percent=1.0),
    ]


def _with(entry: list, **options: float) -> list:
    return [entry[0], {**entry[1], **options}]
