"""Speech: convolutions, a bidirectional GRU and CTC, on utterances of many lengths."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.data import DataLoader

torch.manual_seed(0)


class Recognizer(nn.Module):
    def __init__(self, mels=16, width=32, letters=12):
        super().__init__()
        self.conv1 = nn.Conv1d(mels, width, 3, stride=2, padding=1)
        self.norm1 = nn.BatchNorm1d(width)
        self.conv2 = nn.Conv1d(width, width, 3, padding=1)
        self.rnn = nn.GRU(width, width, bidirectional=True, batch_first=True)
        self.norm2 = nn.LayerNorm(2 * width)
        self.ff1, self.ff2 = nn.Linear(2 * width, 4 * width), nn.Linear(4 * width, 2 * width)
        self.head = nn.Linear(2 * width, letters)

    def forward(self, features, lengths):
        x = F.relu(self.norm1(self.conv1(features.transpose(1, 2))))
        x = F.relu(self.conv2(x)).transpose(1, 2)
        lengths = (lengths + 1) // 2
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        x, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        x = x + self.ff2(F.silu(self.ff1(self.norm2(x))))
        return self.head(x).log_softmax(-1), lengths


def make_utterance():
    letters = torch.randint(1, 12, (int(torch.randint(3, 7, ())),))
    frames = letters.repeat_interleave(int(torch.randint(6, 12, ())))
    return F.one_hot(frames, 16).float() + 0.1 * torch.randn(len(frames), 16), letters


def collate(rows):
    features, letters = zip(*rows)
    padded = nn.utils.rnn.pad_sequence(features, batch_first=True)
    lengths = torch.tensor([len(f) for f in features])
    return padded, lengths, torch.cat(letters), torch.tensor([len(row) for row in letters])


data = [make_utterance() for _ in range(160)]
loader = DataLoader(data, batch_size=8, shuffle=True, collate_fn=collate)
model = Recognizer()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
# one-liner: import autoprec; autoprec.apply(PLAN, model, optimizer)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=20)
ctc = nn.CTCLoss(zero_infinity=True)
model.train()
for features, lengths, letters, letter_lengths in loader:
    log_probs, output_lengths = model(features, lengths)
    loss = ctc(log_probs.transpose(0, 1), letters, output_lengths, letter_lengths)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    optimizer.step()
    schedule.step()
    print("loss", loss.item())
