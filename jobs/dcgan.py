"""A DCGAN on scikit-learn's handwritten digits (Radford, Metz and Chintala, 2015): two updates that take turns."""

from __future__ import annotations

from dataclasses import dataclass, field

import elastic
from elastic import BatchOptions, EvalOptions, RunOptions, TrainConfig
from jobs.digits import Images

CONFIG = TrainConfig(
    run=RunOptions(duration="20ep"),
    batch=BatchOptions(global_size=64, microbatches=8),
    eval=EvalOptions(every="5ep", sample_every="5ep"),
)


@dataclass
class DCGAN(elastic.Job):
    """The discriminator learns to tell digits from what the generator makes; the generator, to be taken for digits."""

    lr: float = field(default=1e-3, metadata={"help": "learning rate of both"})
    width: int = field(default=16, metadata={"help": "channels of the widest images"})
    latent: int = field(default=16, metadata={"help": "numbers that an image is made from"})

    phases = ("discriminator", "generator")

    def model(self):
        from torch import nn

        w = self.width
        generator = nn.Sequential(
            nn.ConvTranspose2d(self.latent, 2 * w, 4, bias=False),
            nn.BatchNorm2d(2 * w),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * w, w, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(w),
            nn.ReLU(),
            nn.Conv2d(w, 1, 3, padding=1),
            nn.Sigmoid(),
        )
        discriminator = nn.Sequential(
            nn.Conv2d(1, w, 3, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(w, 2 * w, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * w),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * w, 1, 4),
            nn.Flatten(0),
        )

        class GAN(nn.Module):
            def __init__(self):
                super().__init__()
                self.generator, self.discriminator = generator, discriminator

            def forward(self, noise):
                return self.discriminator(self.generator(noise))

        return GAN()

    def optimizer(self, model):
        import torch

        return {
            name: torch.optim.Adam(part.parameters(), lr=self.lr, betas=(0.5, 0.999))
            for name, part in model.named_children()
        }

    def train_data(self):
        return WithNoise(Images(held_out=False), self.latent)

    def eval_data(self):
        return WithNoise(Images(held_out=True), self.latent)

    def loss_discriminator(self, model, batch):
        images, noise = batch
        real, made = model.discriminator(images), model(noise)
        return _as(real, 1) + _as(made, 0), len(images), {"fooled": (made > 0).sum()}

    def loss_generator(self, model, batch):
        _, noise = batch
        made = model(noise)
        return _as(made, 1), len(noise), {"fooled": (made > 0).sum()}

    def evaluate(self, model, batch):
        return self.loss_discriminator(model, batch)

    def sample(self, model, step):
        import torch

        noise = torch.randn(16, self.latent, 1, 1, generator=torch.Generator().manual_seed(0))
        images = model.generator(noise.to(next(model.parameters()).device))
        return {"digits": images.reshape(2, 8, 8, 8).transpose(1, 2).reshape(16, 64)}


class WithNoise:
    """An image, float32 (1, 8, 8), and what the generator makes another one from: float32 (latent, 1, 1).

    The noise is drawn where an image is fetched, so that both phases have the same, and each epoch has another.
    """

    def __init__(self, images: Images, latent: int):
        self.images, self.latent = images, latent

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        import torch

        return self.images[index][0], torch.randn(self.latent, 1, 1)


def _as(logits, label: int):
    """The loss of images that are to be taken for digits (1) or for made ones (0), summed."""
    import torch
    from torch.nn import functional

    return functional.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label), reduction="sum")


if __name__ == "__main__":
    elastic.main(DCGAN, CONFIG)
