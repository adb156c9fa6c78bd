"""Train a small net on scikit-learn's handwritten digits."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils import data


def make_data():
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return [data.TensorDataset(images[part], labels[part]) for part in (order[:1437], order[1437:])]


def make_model():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 10))


def train():
    train_data, eval_data = make_data()
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(10):
        for images, labels in data.DataLoader(train_data, batch_size=64, shuffle=True):
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()
            optimizer.step()
    model.eval()
    images, labels = eval_data[:]
    print(f"held-out accuracy {(model(images).argmax(1) == labels).float().mean():.4f}")


if __name__ == "__main__":
    train()
