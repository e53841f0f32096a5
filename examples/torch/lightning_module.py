"""AdamP in Lightning: python examples/torch/lightning_module.py

`configure_optimizers` returns the optimizer as any other; Lightning's own precision, clipping and checkpoints apply.
"""

import lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from adamp_torch import AdamP

EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 6, 64, 1e-2, 1e-2


class Digits(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(32, 10),
        )  # fmt: skip

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.network(images), labels)

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        images, labels = batch
        self.log("accuracy", (self.network(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> dict:
        optimizer = AdamP(self.named_parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> float:
    """Returns the accuracy on the test images."""
    lightning.seed_everything(0, verbose=False)
    pixels, digits = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(digits)
    test = torch.arange(len(x)) % 5 == 4
    train_loader = DataLoader(TensorDataset(x[~test], y[~test]), BATCH, shuffle=True)
    test_loader = DataLoader(TensorDataset(x[test], y[test]), len(x))

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_epochs=EPOCHS, gradient_clip_val=1.0, enable_model_summary=False, **quiet)
    model = Digits()
    trainer.fit(model, train_loader)
    return float(trainer.test(model, test_loader, verbose=False)[0]["accuracy"])


if __name__ == "__main__":
    print(f"test accuracy {main():.4f}")
