"""A tiny PEFT-like training that test_checkpoint_strategies.py starts under every strategy.

main(job) runs on every process. The job is {out_dir, optimizer, commands}; the commands are done in order:
    ["dropout", p]
    ["train", step]     go on until that many updates are done; the same global batch on 1, 2 and 3 processes
    ["save", name]      save_checkpoint into the job's out_dir; what follows goes on while it is written
    ["load", name]      load_checkpoint from there
    ["dump", name]      write trained values, moments, steps and the losses since the last load to <name>.pt
    ["refuse", name]    load_checkpoint must raise a UserError; its text goes to <name>-<rank>.txt
"""

import os
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from rwkv_accel.checkpoint import CheckpointWriter, SaveCadence, load_checkpoint, save_checkpoint
from rwkv_accel.checkpoint.strategy import gather_trained
from rwkv_accel.config.schema import CheckpointConfig, TrainerConfig
from rwkv_accel.errors import UserError
from rwkv_accel.interrupt import StopRequest
from rwkv_accel.runtime import build_accelerator, set_environment_defaults

VOCAB, WIDTH, RANK, ROWS, MICRO_BATCHES, LENGTH = 50, 48, 5, 12, 2, 9


class LoraLinear(nn.Linear):
    def __init__(self):
        super().__init__(WIDTH, WIDTH, bias=False)
        self.weight.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(RANK, WIDTH) * 0.1)
        self.lora_B = nn.Parameter(torch.randn(WIDTH, RANK) * 0.1)

    def forward(self, x):
        return F.linear(x, self.weight) + x @ self.lora_A.T @ self.lora_B.T


class Block(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.ln = nn.LayerNorm(WIDTH)
        self.mix = nn.Parameter(torch.rand(1, 1, WIDTH))
        self.odd = nn.Parameter(torch.randn(7) * 0.1)  # not a multiple of 2 or 3 processes
        self.key = LoraLinear()
        self.dropout = dropout

    def forward(self, x):
        x = x + self.key(torch.relu(self.ln(x)) * self.mix) + self.odd.mean()
        return F.dropout(x, self.dropout[0], self.training)


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.dropout = [0.0]  # shared by the blocks, so that a command can change it
        self.emb = nn.Embedding(VOCAB, WIDTH)
        self.emb.weight.requires_grad_(False)
        self.blocks = nn.ModuleList(Block(self.dropout) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids, labels):
        x = self.emb(ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten(), reduction="sum")


def build_optimizer(model, kind):
    groups = {"lora": [], "head": [], "other": []}
    for name, param in model.named_parameters():
        if param.requires_grad:
            groups["lora" if "lora" in name else "head" if "head" in name else "other"].append(param)
    groups = [{"params": params, "name": name, "lr": 1e-3} for name, params in groups.items()]
    if kind == "adamw":
        return torch.optim.AdamW(groups, betas=(0.9, 0.99))
    return torch.optim.SGD(groups, momentum=0.9 if kind == "sgd-momentum" else 0.0)


def rows_of(step):
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(0, VOCAB, (ROWS, LENGTH + 1), generator=generator)


class Worker:
    def __init__(self, job):
        set_environment_defaults()
        self.out_dir = Path(job["out_dir"])
        torch.manual_seed(7)
        model = Tiny()
        self.dropout = model.dropout
        optimizer = build_optimizer(model, job.get("optimizer", "adamw"))
        world = int(os.environ.get("WORLD_SIZE", "1"))
        trainer = TrainerConfig(micro_batch_size=ROWS // MICRO_BATCHES // world, gradient_clip_val=0.5)
        self.accelerator = build_accelerator(trainer, MICRO_BATCHES)
        self.micro = trainer.micro_batch_size
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        torch.manual_seed(100 + self.accelerator.process_index)
        self.writer = CheckpointWriter(self.out_dir, CheckpointConfig(keep_last=100))
        self.step, self.losses = 0, []

    def train(self, until):
        accelerator, model, optimizer = self.accelerator, self.model, self.optimizer
        model.train()
        deepspeed = accelerator.distributed_type == "DEEPSPEED"
        scale = MICRO_BATCHES * accelerator.num_processes / (ROWS * LENGTH)
        while self.step < until:
            for i, group in enumerate(optimizer.param_groups):
                group["lr"] = 2e-3 * (i + 1) / (1 + self.step)
                group["weight_decay"] = 0.01 * i * self.step
            rows = rows_of(self.step)
            loss_sum = 0.0
            for m in range(MICRO_BATCHES):
                accelerator.sync_gradients = m == MICRO_BATCHES - 1
                begin = (m * accelerator.num_processes + accelerator.process_index) * self.micro
                mine = rows[begin : begin + self.micro].to(accelerator.device)
                with nullcontext() if deepspeed or accelerator.sync_gradients else accelerator.no_sync(model):
                    loss = model(mine[:, :-1], mine[:, 1:])
                    accelerator.backward(loss * scale)
                loss_sum = loss_sum + loss.detach()
            if not deepspeed:
                accelerator.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.5)
            optimizer.step()
            optimizer.zero_grad()
            self.step += 1
            self.losses.append(accelerator.reduce(loss_sum, "sum").item() / (ROWS * LENGTH))

    def save(self, name):
        save_checkpoint(
            self.accelerator,
            self.model,
            self.optimizer,
            {"step": self.step},
            writer=self.writer,
            name=name,
            config={"run": "tiny"},
            base_digest="sha256:base",
            extra={"written_by": name},
            extra_tensors={"residual": torch.arange(5.0)},
        )

    def load(self, name):
        self.writer.finish(self.accelerator)
        saved = load_checkpoint(self.accelerator, self.model, self.optimizer, self.out_dir / "checkpoints" / name)
        assert saved["extra"] == {"written_by": name}
        assert saved["config"] == {"run": "tiny"}
        assert torch.equal(saved["extra_tensors"]["residual"], torch.arange(5.0))
        self.step, self.losses = saved["state"]["step"], []

    def dump(self, name):
        trained = gather_trained(self.accelerator, self.model, self.optimizer)
        if self.accelerator.is_main_process:
            torch.save(
                {
                    "params": trained.params,
                    "moments": trained.moments,
                    "steps": trained.steps,
                    "losses": self.losses,
                },
                self.out_dir / f"{name}.pt",
            )

    def refuse(self, name):
        try:
            self.load(name)
        except UserError as error:
            (self.out_dir / f"{name}-{self.accelerator.process_index}.txt").write_text(str(error))
        else:
            raise AssertionError(f"{name} was loaded")

    def set_dropout(self, p):
        self.dropout[0] = p


def agree_on_minutes(job):
    """Each rank writes what `due` says while its own clock and the main process's run differently."""
    set_environment_defaults()
    accelerator = build_accelerator(TrainerConfig(), 1)
    minutes = 0
    stop = StopRequest()
    stop.cadence = SaveCadence(CheckpointConfig(every_n_minutes=10), lambda: 60 * minutes)
    stop.defer(accelerator)
    seen = []
    for main_minutes, other_minutes in ((0, 99), (9, 99), (10, 0), (10, 0)):
        minutes = main_minutes if accelerator.is_main_process else other_minutes
        assert not stop.agreed()
        seen.append(stop.cadence.due(1))
        if seen[-1]:
            stop.cadence.restart()
    (Path(job["out_dir"]) / f"due-{accelerator.process_index}.txt").write_text(str(seen))
    return accelerator


def main(job):
    worker = Worker(job)
    commands = {
        "dropout": worker.set_dropout,
        "train": worker.train,
        "save": worker.save,
        "load": worker.load,
        "dump": worker.dump,
        "refuse": worker.refuse,
    }
    for command, argument in job["commands"]:
        commands[command](argument)
    worker.writer.finish(worker.accelerator)
    worker.accelerator.wait_for_everyone()
    return worker
