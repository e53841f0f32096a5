"""A small transformer in PyTorch, trained with AdamP: fused attention, and an embedding that is the output head too."""

import torch
from torch import Tensor, nn

from adamp_spec import Layout
from adamp_torch import AdamP

WIDTH, HEADS, LENGTH, TOKENS = 32, 4, 32, 128


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.expand = nn.Linear(WIDTH, 4 * WIDTH)
        self.contract = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, attn_mask=mask, is_causal=True, need_weights=False)[0]
        return x + self.contract(nn.functional.gelu(self.expand(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(TOKENS, WIDTH)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        self.block1, self.block2 = Block(), Block()
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        self.head.weight = self.tokens.weight
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.1)

    def forward(self, pieces: Tensor) -> Tensor:
        """(batch, LENGTH) -> (batch, LENGTH, TOKENS)."""
        x = self.tokens(pieces) + self.positions.weight
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        return self.head(self.norm(self.block2(self.block1(x, mask), mask)))


def setup() -> tuple[nn.Module, torch.optim.Optimizer]:
    """Biases and norms do not decay. Query, key and value, one tensor here, decide as the three that others have."""
    torch.manual_seed(0)
    model = Transformer()
    named = list(model.named_parameters())
    weights, vectors = [x for x in named if x[1].ndim > 1], [x for x in named if x[1].ndim == 1]
    groups = [{"params": weights, "weight_decay": 0.03}, {"params": vectors, "weight_decay": 0.0}]
    return model, AdamP(groups, lr=3e-3, layouts={"in_proj_weight$": Layout(1, batch=0, view=(3, WIDTH, WIDTH))})
