"""A task that has nothing to do with text: scikit-learn's handwritten digits, told apart by a small network."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from anabranch.train import Examples, Losses, Task


class Digits(Task):
    """Which digit is it? 8 x 8 pixels; the last 397 images are held out."""

    headline, unit, material = "accuracy", "images", "images"

    def __init__(self, config, *, model=None):
        super().__init__(config, model=model)
        images, labels = load_digits(return_X_y=True)
        self.image_ND, self.label_N = torch.tensor(images).float() / 16, torch.tensor(labels)

    def build_model(self, context):
        return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def training_data(self, context):
        place = {"rank": context.rank, "world_size": context.world_size}
        return Examples(self.image_ND[:1400], self.label_N[:1400], seed=context.settings.seed, **place)

    def validation_data(self, context):
        return self.image_ND[1400:], self.label_N[1400:]

    def step(self, model, batch, context):
        image_BD, label_B = batch
        return Losses.of(cross_entropy=F.cross_entropy(model(image_BD), label_B))

    def evaluate(self, model, data, context):
        image_ND, label_N = data
        return {"accuracy": float((model(image_ND).argmax(1) == label_N).float().mean())}
