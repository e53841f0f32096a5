"""A recurrent network in PyTorch that reads images of digits row by row, trained with AdamP.

An LSTM has two biases here, of which only the sum matters, and one elsewhere: the second is frozen at zero.
"""

import torch
from torch import Tensor, nn

from adamp_torch import AdamP


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 16, bias=False)
        self.norm = nn.LayerNorm(16)
        self.lstm = nn.LSTM(16, 32, batch_first=True)
        self.head = nn.Linear(32, 10)
        nn.init.zeros_(self.lstm.get_parameter("bias_hh_l0")).requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """(batch, 8, 8) -> (batch, 10)."""
        states, _ = self.lstm(self.norm(self.project(images)))
        return self.head(states[:, -1])


def setup() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Reader()
    trained = [x for x in model.named_parameters() if x[1].requires_grad]
    return model, AdamP(trained, lr=1e-2, weight_decay=1e-2, nesterov=True)
