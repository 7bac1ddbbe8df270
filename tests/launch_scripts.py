"""Training scripts as users write them, built from parts; and a place to run them in."""

import sys
from pathlib import Path

import pytest

HEAD = """
import sys
import torch, torch.nn.functional as F
from torch import nn
torch.manual_seed(0)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(32, 64), nn.LayerNorm(64), nn.Linear(64, 16)
    def forward(self, x):
        return self.head(F.dropout(self.norm(F.gelu(self.first(x))), 0.1, self.training))

def batches(count):
    for _ in range(count):
        x = torch.randn(16, 32)
        yield x, x[:, :16].argmax(1)

model = Net()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
"""
LOOP = """
for x, y in batches(int(sys.argv[1])):
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"{loss.item():.17g}")
"""

SHARDED = f"""{HEAD}
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
store = dist.HashStore() if "RANK" not in __import__("os").environ else None
alone = dict(store=store, rank=0, world_size=1) if store else {{}}
dist.init_process_group("gloo", **alone)
init_device_mesh("cpu", (dist.get_world_size(),))
policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
fully_shard(model.first, mp_policy=policy)
fully_shard(model, mp_policy=policy)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
"""

# the model has no forward: a method of it calls its layers
PARTS = HEAD.replace("def forward(self, x)", "def logits(self, x)")
PARTS += LOOP.replace("model(x)", "model.logits(x)")

# a body and a head of its own, trained side by side: attributes of an object, and local variables
APART = (
    HEAD.partition("model = Net()")[0]
    + """
class Trainer:
    def __init__(self):
        self.body, self.head = Net(), nn.Linear(16, 16)
    def fit(self):
        optimizer = torch.optim.SGD([*self.body.parameters(), *self.head.parameters()], lr=0.1)
        BEFORE
        for x, y in batches(int(sys.argv[1])):
            loss = F.cross_entropy(self.head(self.body(x)), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            print(f"{loss.item():.17g}")
Trainer().fit()
"""
)


def write_script(folder: Path, body: str, *, name: str = "train.py") -> str:
    """Write a script and return its path."""
    path = folder / name
    path.write_text(body)
    return str(path)


@pytest.fixture
def own_main(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put back what a script that runs in this process takes over."""
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    monkeypatch.setattr(sys, "argv", [*sys.argv])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
