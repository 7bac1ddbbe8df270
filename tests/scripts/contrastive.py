"""SimCLR on digits: two views of each image through one encoder, and a loss that compares them."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_digits

torch.manual_seed(0)


class Encoder(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.head = nn.Sequential(
            nn.Linear(32 * width, 256), nn.GELU(), nn.Dropout(0.1), nn.Linear(256, 64)
        )

    def forward(self, x):
        return F.normalize(self.head(self.body(x)), dim=-1)


def augment(x):
    dx, dy = torch.randint(-1, 2, (2,)).tolist()
    return torch.roll(x, (dx, dy), (2, 3)) + 0.1 * torch.randn_like(x)


def nt_xent(a, b, temperature=0.5):
    z = torch.cat([a, b])
    similarity = z @ z.T / temperature
    similarity = similarity.masked_fill(torch.eye(len(z), dtype=torch.bool), -1e4)
    return F.cross_entropy(similarity, torch.arange(len(z)).roll(len(a)))


images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
model = Encoder()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
# one-liner: import autoprec; autoprec.apply(PLAN, model, optimizer)

for step in range(20):
    x = images[torch.randint(0, len(images), (64,))]
    loss = nt_xent(model(augment(x)), model(augment(x)))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    print(f"loss {loss.item():.9g}")
