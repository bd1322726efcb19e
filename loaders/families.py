"""The published model families: how each is recognised and where it is published."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """One published system.

    Args:
        name: key used in node widgets.
        title: name shown to users.
        component: sub-folder of the network in a diffusers folder.
        network_class: `_class_name` in that folder's config.json.
        repository: where the weights are published.
        marker: state dict key that only this family has.
    """

    name: str
    title: str
    component: str
    network_class: str
    repository: str
    marker: str


MODELSCOPE = Family(
    name="modelscope",
    title="ModelScope text-to-video",
    component="unet",
    network_class="UNet3DConditionModel",
    repository="ali-vilab/text-to-video-ms-1.7b",
    marker="transformer_in.norm.weight",
)
