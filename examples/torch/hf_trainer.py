"""AdamP in the Trainer of Hugging Face transformers: python examples/torch/hf_trainer.py

`optimizer_cls_and_kwargs` lets the Trainer make the optimizer: it puts biases and norms into a group without decay,
adds its schedule, and saves and resumes both. The model is a small vision transformer, made from its configuration.
"""

import tempfile

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from adamp_torch import AdamP

EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 6, 32, 5e-3, 1e-2


class Digits(Dataset):
    def __init__(self, test: bool) -> None:
        pixels, digits = load_digits(return_X_y=True)
        part = (np.arange(len(digits)) % 5 == 4) == test
        self.images = torch.tensor(pixels[part] / 8 - 1, dtype=torch.float32).reshape(-1, 1, 8, 8)
        self.labels = torch.tensor(digits[part])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.images[i], "labels": self.labels[i]}


def main() -> float:
    """Returns the accuracy on the test images."""
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, initializer_range=0.1, num_labels=10,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=EPOCHS, per_device_train_batch_size=BATCH, weight_decay=WEIGHT_DECAY,
            learning_rate=LEARNING_RATE, lr_scheduler_type="cosine", warmup_steps=20, seed=0, save_strategy="no",
            report_to="none", disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        torch.manual_seed(0)
        trainer = Trainer(
            ViTForImageClassification(config),
            arguments,
            train_dataset=Digits(test=False),
            optimizer_cls_and_kwargs=(AdamP, {"lr": LEARNING_RATE}),
        )
        trainer.train()
        predicted = trainer.predict(Digits(test=True))
    return float((predicted.predictions.argmax(1) == predicted.label_ids).mean())


if __name__ == "__main__":
    print(f"test accuracy {main():.4f}")
