"""AdamP in a loop of Hugging Face Accelerate: python examples/torch/accelerate_loop.py

Accelerate wraps the optimizer and its scheduler; the step is AdamP's own. Here the gradients of two
batches are added up and clipped, and the run is saved and taken up again half-way.
"""

import tempfile

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from adamp_torch import AdamP

EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 6, 32, 1e-2, 1e-2


def main() -> float:
    """Returns the accuracy on the test images."""
    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    pixels, digits = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(digits)
    test = torch.arange(len(x)) % 5 == 4
    loader = DataLoader(TensorDataset(x[~test], y[~test]), BATCH, shuffle=True)

    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    optimizer = AdamP(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * len(loader) // 2)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    with tempfile.TemporaryDirectory() as folder:
        for epoch in range(EPOCHS):
            if epoch == EPOCHS // 2:  # as a run that was stopped and started again does
                accelerator.load_state(folder)
            for images, labels in loader:
                with accelerator.accumulate(model):
                    loss = nn.functional.cross_entropy(model(images), labels)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
            accelerator.save_state(folder)

    model.eval()
    with torch.no_grad():
        predicted = model(x[test].to(accelerator.device)).argmax(1).cpu()
    return float((predicted == y[test]).float().mean())


if __name__ == "__main__":
    print(f"test accuracy {main():.4f}")
