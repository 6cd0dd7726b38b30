"""A training job as its author would write it: FSDP2, AdamW, checkpoints with Shardkeep.

    torchrun --nproc-per-node 4 -m demo.train runs/gpt

When restarted, on any number of ranks, it continues from the newest committed checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import sysconfig
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import shardkeep as sk
from demo.model import GPT, GPTConfig

END_OF_FILE = 256


class Trainer:
    """The training job. `state()` holds all that changes while it runs."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.folder = args, Path(args.folder)
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        torch.manual_seed(args.seed)  # the same weights on every rank
        config = GPTConfig(width=args.width, heads=args.width // 32, layers=args.layers)
        self.model = GPT(config).shard()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=args.lr, betas=(0.9, 0.95))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.warm_up_then_cosine)
        self.data = Samples(stdlib_source(), config.context)
        self.step = 0
        self.cursor = 0  # number of samples that all ranks have seen together
        torch.manual_seed(args.seed + 1 + self.rank)  # another dropout on every rank

    def warm_up_then_cosine(self, step: int) -> float:
        done = min(1.0, step / self.args.steps)
        return min(1.0, (step + 1) / 10) * (0.55 + 0.45 * math.cos(math.pi * done))

    def state(self) -> dict[str, Any]:
        """Return the state to save. The tensors are those of the job, not copies."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {
            "model": model,
            "optimizer": optimizer,
            "schedule": self.schedule.state_dict(),
            "progress": {"step": self.step, "cursor": self.cursor},
            "rng": {f"rank_{self.rank}": torch.get_rng_state()},
        }

    def save(self) -> sk.SaveReport:
        return sk.save(self.state(), self.folder / f"step_{self.step:06d}")

    def resume(self, path: Path) -> sk.LoadReport:
        state = self.state()
        report = sk.load(
            state, path, strict={"rng.*": False}
        )  # additional ranks have no saved state
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        self.schedule.load_state_dict(state["schedule"])
        self.step, self.cursor = state["progress"]["step"], state["progress"]["cursor"]
        torch.set_rng_state(state["rng"][f"rank_{self.rank}"])
        return report

    def train_step(self) -> float:
        """Train one step on `batch` samples of all ranks together; return their mean loss."""
        mine = range(self.cursor + self.rank, self.cursor + self.args.batch, self.ranks)
        tokens = torch.stack([self.data[index] for index in mine]).long()
        logits = self.model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.step += 1
        self.cursor += self.args.batch
        mean = loss.detach() / self.ranks
        dist.all_reduce(mean)
        return mean.item()

    def run(self) -> None:
        if path := newest(self.folder):
            report = self.resume(path)
            self.log(resumed=self.step, seconds=sum(report.seconds.values()), path=str(path))
        while self.step < self.args.steps:
            begun = time.perf_counter()
            loss, rate = self.train_step(), self.schedule.get_last_lr()[0]
            self.log(step=self.step, loss=loss, lr=rate, seconds=time.perf_counter() - begun)
            if self.step % self.args.save_every == 0:
                report = self.save()
                self.log(saved=self.step, seconds=sum(report.seconds.values()), path=report.path)

    def log(self, **record: Any) -> None:
        if self.rank == 0:
            append(self.folder / "log.jsonl", record)


class Samples:
    """An endless sequence of samples, by a golden-ratio walk that covers the text evenly."""

    def __init__(self, tokens: torch.Tensor, context: int) -> None:
        self.tokens, self.length = tokens, context + 1
        self.places = len(tokens) - self.length
        self.stride = int(self.places * (math.sqrt(5) - 1) / 2)

    def __getitem__(self, index: int) -> torch.Tensor:
        start = index * self.stride % self.places
        return self.tokens[start : start + self.length]


def stdlib_source() -> torch.Tensor:
    """Return the source of Python's standard library as one sequence of tokens."""
    root = Path(sysconfig.get_path("stdlib"))
    end = torch.tensor([END_OF_FILE], dtype=torch.int16)
    tokens = []
    for path in sorted(root.rglob("*.py")):
        text = path.read_bytes()
        if text and not {"site-packages", "test", "tests"} & set(path.relative_to(root).parts):
            tokens += [torch.frombuffer(bytearray(text), dtype=torch.uint8).short(), end]
    return torch.cat(tokens)


def newest(folder: Path) -> Path | None:
    """Return the newest checkpoint that can be opened, which only a committed one can."""
    for path in sorted(folder.glob("step_*"), reverse=True):
        with suppress(sk.NotACheckpoint):
            sk.open(path)
            return path
    return None


def append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="folder for checkpoints and log.jsonl")
    parser.add_argument("--steps", type=int, default=140)
    parser.add_argument("--save-every", type=int, default=20)
    parser.add_argument(
        "--batch", type=int, default=16, help="samples per step, of all ranks together"
    )
    parser.add_argument("--width", type=int, default=160)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main(job: type[Trainer] = Trainer) -> None:
    args = arguments()
    Path(args.folder).mkdir(parents=True, exist_ok=True)
    dist.init_process_group("gloo")
    job(args).run()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
