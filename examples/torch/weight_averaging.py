"""AdamP with stochastic weight averaging: python examples/torch/weight_averaging.py

For the last epochs the learning rate is held at a constant (SWALR) and the weights are averaged (AveragedModel). The
averaged weights have norms of their own, hence statistics of batch normalisation of their own (`update_bn`).
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.swa_utils import SWALR, AveragedModel, update_bn

from adamp_torch import AdamP

EPOCHS, AVERAGED, BATCH, LEARNING_RATE, SWA_LEARNING_RATE = 8, 3, 64, 1e-2, 2e-3


def main() -> float:
    """Returns the accuracy of the averaged model on the test images."""
    torch.manual_seed(0)
    pixels, digits = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(digits)
    test = torch.arange(len(x)) % 5 == 4
    x_train, y_train, x_test, y_test = x[~test], y[~test], x[test], y[test]

    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    optimizer = AdamP(model.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
    cosine = CosineAnnealingLR(optimizer, EPOCHS)
    constant = SWALR(optimizer, swa_lr=SWA_LEARNING_RATE, anneal_epochs=2)
    averaged = AveragedModel(model)

    for epoch in range(EPOCHS):
        for batch in torch.randperm(len(x_train)).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x_train[batch]), y_train[batch]).backward()
            optimizer.step()
        if epoch < EPOCHS - AVERAGED:
            cosine.step()
        else:
            averaged.update_parameters(model)
            constant.step()
    update_bn(x_train.split(BATCH), averaged)

    averaged.eval()
    with torch.no_grad():
        return float((averaged(x_test).argmax(1) == y_test).float().mean())


if __name__ == "__main__":
    print(f"test accuracy {main():.4f}")
