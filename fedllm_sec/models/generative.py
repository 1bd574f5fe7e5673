"""A generator and a discriminator of images (DCGAN).

Shapes: images are (n, C, H, W) in [-1, 1], noise is (n, `noise`).
"""

from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from fedllm_sec.models.model import Builder, Norm, Shape, image_shape, model, normaliser
from fedllm_sec.updates.errors import InputError

SLOPE = 0.2  # of LeakyReLU
SPREAD = 0.02  # standard deviation of all first weights
Width = Annotated[int, Field(ge=1)]


class DCGAN(nn.Module):
    """A generator and a discriminator.

    Attributes:
        generator: (n, noise) -> (n, C, H, W) in [-1, 1].
        discriminator: (n, C, H, W) -> (n,) logits, positive for real images.
        noise: how many numbers make an image; the paper draws them uniformly from [-1, 1].
        procedure: how it is trained.
    """

    procedure = "gan"

    def __init__(self, generator: nn.Module, discriminator: nn.Module, noise: int):
        super().__init__()
        self.generator, self.discriminator, self.noise = generator, discriminator, noise

    def forward(self, images: Tensor) -> Tensor:
        """The discriminator's logits."""
        logits: Tensor = self.discriminator(images)
        return logits


@model("dcgan", paper="Radford et al. 2016, arXiv:1511.06434")
def dcgan(*, noise: Width = 100, width: Width = 64, norm: Norm = "batch", groups: Width = 2) -> Builder:
    """A generator and a discriminator of images, convolutions of stride 2 throughout.

    The paper's networks for 64 x 64 images with two steps in place of four, so that 28 x 28 and 32 x 32 come out:
    `width` channels next to the image and twice as many further in. There is no normalisation at the generator's output
    and the discriminator's input, as in the paper. Both work on images in [-1, 1], to which pixels must be scaled; a
    task's `prepare` does another scaling.
    """

    def build(shape: Shape) -> nn.Module:
        channels, height, width_of_image = image_shape(shape, "dcgan", least=8)
        if height % 4 or width_of_image % 4:
            raise InputError(
                f"model dcgan takes images whose sides are multiples of 4, not {height} x {width_of_image}"
            )
        inner = (2 * width, height // 4, width_of_image // 4)
        features = inner[0] * inner[1] * inner[2]
        generator = nn.Sequential(
            nn.Linear(noise, features, bias=False), nn.Unflatten(1, inner),
            normaliser(norm, inner[0], groups), nn.ReLU(),
            nn.ConvTranspose2d(inner[0], width, 4, 2, 1, bias=False), normaliser(norm, width, groups), nn.ReLU(),
            nn.ConvTranspose2d(width, channels, 4, 2, 1), nn.Tanh(),
        )  # fmt: skip
        discriminator = nn.Sequential(
            nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(SLOPE),
            nn.Conv2d(width, inner[0], 4, 2, 1, bias=False), normaliser(norm, inner[0], groups), nn.LeakyReLU(SLOPE),
            nn.Flatten(), nn.Linear(features, 1), nn.Flatten(0),
        )  # fmt: skip
        made = DCGAN(generator, discriminator, noise)
        for module in made.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                nn.init.normal_(module.weight, 0, SPREAD)
        return made

    return build
