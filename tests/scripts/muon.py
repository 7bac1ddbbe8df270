"""Two optimizers: Muon on a decoder's matrices, AdamW on the rest, warm-up and decay by hand."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

torch.manual_seed(0)


class Block(nn.Module):
    """Attention and an MLP with squared ReLU, each behind an RMS norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return x [B, T, width] with both added."""
        heads = self.qkv(F.rms_norm(x, x.shape[-1:])).unflatten(-1, (3, 2, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind()
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(F.rms_norm(x, x.shape[-1:]))).square())


class Decoder(nn.Module):
    """A language model of 64 tokens."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, 64, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits [B, T, 64]."""
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(F.rms_norm(x, x.shape[-1:]))
        return logits


model = Decoder()
matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
others = [p for p in model.parameters() if not any(p is m for m in matrices)]
optimizers = torch.optim.AdamW(others, lr=1e-2), torch.optim.Muon(matrices, lr=0.02)
# one-liner: import autoprec; [autoprec.apply(PLAN, model), *(autoprec.attach_optimizer(model, o) for o in optimizers)]  # noqa: E501
rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
for step in range(24):
    ids = torch.randint(3, (4, 33)).cumsum(1) % 64
    loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    model.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer, own in zip(optimizers, rates, strict=True):
        for group, rate in zip(optimizer.param_groups, own, strict=True):
            group["lr"] = rate * min((step + 1) / 4, (24 - step) / 12, 1.0)
        optimizer.step()
    print("loss", loss.item(), norm.item())
