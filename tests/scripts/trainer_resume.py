"""transformers' Trainer: accumulation, checkpointing, warm-up and cosine, evaluation, a resume."""

import tempfile

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments


class Tokens(Dataset):
    def __init__(self, count, seed):
        generator = torch.Generator().manual_seed(seed)
        self.rows = torch.randint(3, (count, 24), generator=generator).cumsum(1) % 64

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class Printer(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        for name in ("loss", "eval_loss"):
            if logs and name in logs:
                print(name.removeprefix("eval_"), state.global_step, logs[name])


def train(folder, max_steps, resume):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        max_steps=max_steps,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=4,
        logging_steps=1,
        save_steps=10,
        eval_strategy="steps",
        eval_steps=10,
        bf16=True,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=GPT2LMHeadModel(config),
        args=arguments,
        train_dataset=Tokens(256, seed=1),
        eval_dataset=Tokens(16, seed=2),
        callbacks=[Printer()],
    )
    # one-liner: from autoprec.integrations.transformers import apply; apply(PLAN, trainer)
    trainer.train(resume_from_checkpoint=resume)


folder = tempfile.mkdtemp()
train(folder, 20, None)
train(folder, 24, True)
