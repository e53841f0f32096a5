"""AdamP by name from timm's optimizer factory: python examples/torch/timm_factory.py

Once registered, it is made as any other of timm's: by `create_optimizer_v2`, `--opt adamp-parity`, with weight decay
for matrices only and layer-wise learning rates. A name must have no "_", at which timm cuts. (timm's own "adamp" has
other defaults: Nesterov's momentum and wd_ratio=0.01.)
"""

import torch
from sklearn.datasets import load_digits
from timm.optim import OptimInfo, create_optimizer_v2
from timm.optim._optim_factory import default_registry
from torch import nn

from adamp_torch import AdamP

EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 6, 64, 1e-2, 5e-2

default_registry.register(OptimInfo("adamp-parity", AdamP, "AdamP of adamp-parity", has_betas=True))


def main() -> float:
    """Returns the accuracy on the test images."""
    torch.manual_seed(0)
    pixels, digits = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(digits)
    test = torch.arange(len(x)) % 5 == 4
    x_train, y_train, x_test, y_test = x[~test], y[~test], x[test], y[test]

    model = nn.Sequential(  # or timm.create_model(...)
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    optimizer = create_optimizer_v2(model, "adamp-parity", lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, delta=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)

    for _ in range(EPOCHS):
        for batch in torch.randperm(len(x_train)).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x_train[batch]), y_train[batch]).backward()
            optimizer.step()
        schedule.step()

    model.eval()
    with torch.no_grad():
        return float((model(x_test).argmax(1) == y_test).float().mean())


if __name__ == "__main__":
    print(f"test accuracy {main():.4f}")
