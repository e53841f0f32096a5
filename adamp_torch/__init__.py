"""AdamP and SGDP for PyTorch, as `torch.optim.Optimizer`.

>>> import torch
>>> from adamp_torch import AdamP
>>> model = torch.nn.Linear(3, 2)
>>> optimizer = AdamP(model.parameters(), lr=1e-3, weight_decay=1e-2)
>>> model(torch.ones(1, 3)).sum().backward()
>>> optimizer.step()
"""

from adamp_torch._adamp import AdamP
from adamp_torch._layouts import describe
from adamp_torch._sgdp import SGDP
from adamp_torch._snapshot import load_snapshot, save_snapshot

__all__ = ["SGDP", "AdamP", "describe", "load_snapshot", "save_snapshot"]
