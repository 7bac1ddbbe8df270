"""Accelerate in bf16: accumulation, a schedule, clipping, an evaluation that gathers."""

import torch
import torch.nn as nn
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification, get_linear_schedule_with_warmup


def loaders():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 64, (256, 16), generator=generator)
    data = TensorDataset(ids, (ids[:, 0] > 32).long())
    train, test = torch.utils.data.random_split(data, [224, 32], generator=generator)
    return DataLoader(train, batch_size=4, shuffle=True), DataLoader(test, batch_size=16)


def main():
    set_seed(42)
    accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=2, cpu=True)
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    model = BertForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    # one-liner: import autoprec; autoprec.apply(PLAN, model, optimizer)
    train_loader, test_loader = loaders()
    scheduler = get_linear_schedule_with_warmup(optimizer, 5, 28)
    model, optimizer, train_loader, test_loader, scheduler = accelerator.prepare(
        model, optimizer, train_loader, test_loader, scheduler
    )
    criterion = nn.CrossEntropyLoss()
    model.train()
    for ids, labels in train_loader:
        with accelerator.accumulate(model):
            logits = model(input_ids=ids).logits
            loss = criterion(logits, labels)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        accelerator.print("loss", loss.item())
    model.eval()
    correct = 0
    for ids, labels in test_loader:
        with torch.no_grad():
            predicted = model(input_ids=ids).logits.argmax(-1)
        correct += int((accelerator.gather(predicted) == labels).sum())
    accelerator.print("correct", correct)


if __name__ == "__main__":
    main()
