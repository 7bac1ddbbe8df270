"""transformers' Trainer with bf16=True, on sequences of many lengths."""

import tempfile

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

torch.manual_seed(0)


class Texts(Dataset):
    def __init__(self, count):
        generator = torch.Generator().manual_seed(1)
        lengths = torch.randint(9, 33, (count,), generator=generator).tolist()
        self.rows = [
            torch.randint(3, (n,), generator=generator).cumsum(0) % 61 + 3 for n in lengths
        ]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index]}


def collate(rows):
    ids = torch.nn.utils.rnn.pad_sequence(
        [row["input_ids"] for row in rows], batch_first=True, padding_value=0
    )
    mask = (ids != 0).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


class Printer(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            print("loss", logs["loss"], logs["grad_norm"])


config = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
)
arguments = TrainingArguments(
    output_dir=tempfile.mkdtemp(),
    per_device_train_batch_size=4,
    max_steps=20,
    learning_rate=1e-3,
    logging_steps=1,
    bf16=True,
    use_cpu=True,
    report_to=[],
    save_strategy="no",
    disable_tqdm=True,
)
trainer = Trainer(
    model=LlamaForCausalLM(config),
    args=arguments,
    train_dataset=Texts(256),
    data_collator=collate,
    callbacks=[Printer()],
)
# one-liner: from autoprec.integrations.transformers import apply; apply(PLAN, trainer)
trainer.train()
