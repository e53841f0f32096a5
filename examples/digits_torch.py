"""Train the digits network with `adamp_torch`: python examples/digits_torch.py"""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from adamp_conformance.digits import initial_weights, split
from adamp_torch import AdamP

BATCH, EPOCHS, LEARNING_RATE = 64, 15, 1e-2


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.avg_pool2d(self.bn1(self.conv1(x)).relu(), 2)
        x = nn.functional.avg_pool2d(self.bn2(self.conv2(x)).relu(), 4)
        return self.fc(x.flatten(1))


def train(epochs: int = EPOCHS) -> float:
    """Returns the accuracy on the test images."""
    (images, labels), (test_images, test_labels) = split()
    loader = DataLoader(TensorDataset(torch.from_numpy(images).float()[:, None], torch.from_numpy(labels)), BATCH)
    model = Network()
    for name, weight in initial_weights("torch").items():
        model.get_parameter(name).data.copy_(torch.from_numpy(weight))

    optimizer = AdamP(model.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()

    model.eval()
    with torch.no_grad():
        predicted = model(torch.from_numpy(test_images).float()[:, None]).argmax(1)
    return float((predicted.numpy() == test_labels).mean())


if __name__ == "__main__":
    print(f"test accuracy {train():.4f}")
