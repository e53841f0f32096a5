"""SGDP with warm-up, cosine and a learning rate of its own for the head: python examples/torch/schedules.py

Schedulers of torch.optim write into the groups; the next step uses what it finds there. A group may set any option.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from adamp_torch import SGDP

EPOCHS, BATCH, LEARNING_RATE, WARMUP = 6, 64, 0.1, 20


def main() -> float:
    """Returns the accuracy on the test images."""
    torch.manual_seed(0)
    pixels, digits = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(digits)
    test = torch.arange(len(x)) % 5 == 4
    x_train, y_train, x_test, y_test = x[~test], y[~test], x[test], y[test]

    body = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )  # fmt: skip
    head = nn.Linear(32, 10)
    model = nn.Sequential(body, head)
    groups = [{"params": body.parameters()}, {"params": head.parameters(), "lr": LEARNING_RATE / 2, "weight_decay": 0}]
    optimizer = SGDP(groups, lr=LEARNING_RATE, momentum=0.9, weight_decay=1e-4, nesterov=True)
    steps = EPOCHS * -(-len(x_train) // BATCH)
    warmup = LinearLR(optimizer, start_factor=0.01, total_iters=WARMUP)
    scheduler = SequentialLR(optimizer, [warmup, CosineAnnealingLR(optimizer, steps - WARMUP)], milestones=[WARMUP])

    for _ in range(EPOCHS):
        for batch in torch.randperm(len(x_train)).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x_train[batch]), y_train[batch]).backward()
            optimizer.step()
            scheduler.step()

    model.eval()
    with torch.no_grad():
        return float((model(x_test).argmax(1) == y_test).float().mean())


if __name__ == "__main__":
    print(f"test accuracy {main():.4f}")
