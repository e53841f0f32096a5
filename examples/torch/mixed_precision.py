"""AdamP under autocast with GradScaler: python examples/torch/mixed_precision.py

The weights stay float32; float16 gradients are scaled so that they do not vanish. A step whose gradients overflowed
is left out, with its count. With `fused=True` the step itself unscales, without another pass over the gradients.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from adamp_torch import AdamP

EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 6, 64, 1e-2, 1e-2


def main() -> float:
    """Returns the accuracy on the test images."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pixels, digits = load_digits(return_X_y=True)
    x = torch.tensor(pixels / 16, dtype=torch.float32, device=device).reshape(-1, 1, 8, 8)
    y = torch.tensor(digits, device=device)
    test = torch.arange(len(x), device=device) % 5 == 4
    x_train, y_train, x_test, y_test = x[~test], y[~test], x[test], y[test]

    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(32, 10),
    ).to(device)  # fmt: skip
    optimizer = AdamP(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    scaler = torch.amp.GradScaler(device, growth_interval=100)

    for _ in range(EPOCHS):
        for batch in torch.randperm(len(x_train), device=device).split(BATCH):
            optimizer.zero_grad()
            with torch.autocast(device, dtype=torch.float16):
                loss = nn.functional.cross_entropy(model(x_train[batch]), y_train[batch])
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)  # only because the norm is to be clipped
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        schedule.step()

    model.eval()
    with torch.no_grad():
        return float((model(x_test).argmax(1) == y_test).float().mean())


if __name__ == "__main__":
    print(f"test accuracy {main():.4f}")
