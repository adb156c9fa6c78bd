"""Train a small net on scikit-learn's handwritten digits."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils import data

import elastic


def make_data():
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return [data.TensorDataset(images[part], labels[part]) for part in (order[:1437], order[1437:])]


def make_model():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 10))


class Digits(elastic.Job):
    def model(self):
        return make_model()

    def optimizer(self, model):
        return torch.optim.AdamW(model.parameters(), lr=1e-2)

    def train_data(self):
        return make_data()[0]

    def eval_data(self):
        return make_data()[1]

    def loss(self, model, batch):
        images, labels = batch
        logits = model(images)
        right = (logits.argmax(1) == labels).sum()
        return cross_entropy(logits, labels, reduction="sum"), len(labels), {"accuracy": right}


if __name__ == "__main__":
    elastic.main(Digits)
