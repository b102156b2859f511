"""Separation of talkers that were never heard: ours against a plain loop around torchaudio's network.

Both get the same CPU minutes, one thread and the same training talkers, and run at the same time, so that neighbours
on the machine trouble both alike. Ours is `experiment=conv_tasnet_demo` with epochs as long as will fit
(benchmarks/training.py). The plain loop is what a reader of torchaudio's documentation would write: its network at a
small size (331 thousand weights), Adam at 1e-3, clipping at 5, batches of 4 x 3 s, no schedule.
"""

import time
from pathlib import Path
from typing import Any

import torch
import torchaudio
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.accept import Scores, summarise, table
from benchmarks.training import OurTraining, plan_training
from data.manifest import read_manifest, write_manifest
from data.mixtures import MixtureDataset
from data.sampler import EpochSampler
from losses.pit import pit_neg_si_sdr
from metrics.separation import SeparationMetrics
from models import load
from models.checkpoint import read_checkpoint
from models.conv_tasnet import ConvTasNet

UNIT = "SI-SDRi in dB"
_EPOCHS, _BATCH_SIZE = 5, 2  # of the recipe
_RESERVE = 0.12  # of the budget: what steps may cost more beside the other training than in the calibration


def report(protocol: dict[str, Any], manifest: Path, work: Path) -> tuple[str, dict[str, Any]]:
    """SI-SDRi of every contestant on the protocol's test mixtures, and ours against each."""
    scores, facts = score_contestants(protocol, manifest, work)
    rows = summarise(scores)
    return table(rows, UNIT), {"unit": UNIT, "rows": rows, "scores": scores, "facts": facts}


def score_contestants(protocol: dict[str, Any], manifest: Path, work: Path) -> tuple[Scores, dict[str, Any]]:
    """SI-SDRi in dB of every contestant on every mixture, and what the trainings took."""
    rows = read_manifest(manifest)
    test_speakers = set(protocol["test_speakers"])
    if missing := test_speakers - {row["speaker"] for row in rows}:
        raise SystemExit(f"error: {manifest}: the protocol's talkers {', '.join(sorted(missing))} are not in it")
    test_rows = [row for row in rows if row["speaker"] in test_speakers]
    train_rows = [row for row in rows if row["speaker"] not in test_speakers]
    train_manifest = work / "train.jsonl"
    write_manifest(train_manifest, train_rows)
    print(
        f"{len(train_rows)} recordings to train on, {len(test_rows)} of {len(test_speakers)} other talkers to test on"
    )

    mixtures = mixture_dataset(test_rows, protocol, protocol["num_mixtures"], protocol["segment_s"], protocol["seed"])
    test = MixtureDataset.collate([mixtures[(index, 0)] for index in range(len(mixtures))])
    ours = start_ours(protocol, train_manifest, work)
    plain, plain_facts = train_plain_loop(protocol, train_rows)
    checkpoint, our_facts = ours.finish()
    system = load(checkpoint)
    torch.manual_seed(protocol["train_seed"])
    untrained = ConvTasNet(**read_checkpoint(checkpoint)["system"]["arguments"]).eval()

    sources = test["sources"].shape[1]
    contestants = {
        "ours": lambda mixture: system(mixture),
        "plain torchaudio loop": lambda mixture: plain(mixture[:, None]),
        "untrained network": lambda mixture: untrained(mixture),
        "ours, all masks one": lambda mixture: all_ones(system, mixture),
        "unprocessed": lambda mixture: mixture[:, None].expand(-1, sources, -1),
        "silence": lambda mixture: torch.zeros_like(mixture)[:, None].expand(-1, sources, -1),
    }
    results = {name: si_sdri(separate, test) for name, separate in contestants.items()}
    return results, {"ours": our_facts, "plain torchaudio loop": plain_facts}


def mixture_dataset(
    rows: list[dict[str, Any]], protocol: dict[str, Any], items: int, segment_s: float, seed: int
) -> MixtureDataset:
    return MixtureDataset(
        rows,
        num_items=items,
        sample_rate=protocol["sample_rate"],
        segment_s=segment_s,
        snr_db=tuple(protocol["snr_db"]),
        level_db=protocol["level_db"],
        seed=seed,
    )


def all_ones(system: ConvTasNet, mixture: Tensor) -> Tensor:
    """What the trained filter bank and synthesis make of the mixture when nothing is masked."""
    handle = system.network.separator.register_forward_hook(lambda module, inputs, masks: torch.ones_like(masks))
    try:
        return system(mixture)
    finally:
        handle.remove()


@torch.inference_mode()
def si_sdri(separate: Any, test: dict[str, Tensor]) -> list[float]:
    """Improvement of each mixture, under the best permutation."""
    metric = SeparationMetrics()
    values: list[float] = []
    for index in range(len(test["mixture"])):
        batch = {name: tensor[index : index + 1] for name, tensor in test.items()}
        metric.update(separate(batch["mixture"]), batch["sources"], batch["mixture"], batch["length"])
        values += metric.per_mixture()[1].tolist()
    return values


def start_ours(protocol: dict[str, Any], manifest: Path, work: Path) -> OurTraining:
    """The demo recipe, its epochs stretched or cut to fit."""
    overrides = [
        "experiment=conv_tasnet_demo",
        f"data.train_manifest={manifest}",
        "data.val_manifest=null",
        "data.test_manifest=null",
        f"seed={protocol['train_seed']}",
    ]
    plan = plan_training(
        overrides,
        length=length,
        epochs=_EPOCHS,
        cpu_minutes=protocol["cpu_minutes"],
        reserve=_RESERVE,
        work=work,
    )
    return OurTraining(overrides, length=length, plan=plan, work=work)


def length(steps: int) -> list[str]:
    """Overrides that stretch the recipe's epochs to so many steps in all."""
    return [f"trainer.max_steps={steps}", f"data.train_mixtures={steps // _EPOCHS * _BATCH_SIZE}"]


def train_plain_loop(protocol: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[nn.Module, dict[str, Any]]:
    """torchaudio's network and twenty lines, until the budget is used up."""
    torch.set_num_threads(1)
    start, began = time.process_time(), time.time()
    torch.manual_seed(protocol["train_seed"])
    network = torchaudio.models.ConvTasNet(
        enc_kernel_size=16,
        enc_num_feats=128,
        msk_num_feats=64,
        msk_num_hidden_feats=128,
        msk_num_layers=6,
        msk_num_stacks=2,
        msk_activate="relu",
    )
    dataset = mixture_dataset(rows, protocol, 4000, 3.0, protocol["train_seed"])
    sampler = EpochSampler(dataset, seed=protocol["train_seed"])
    loader = DataLoader(dataset, batch_size=4, sampler=sampler, collate_fn=MixtureDataset.collate, drop_last=True)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    steps = epoch = 0
    while True:
        sampler.set_epoch(epoch)
        for batch in loader:
            used_s = time.process_time() - start
            if used_s >= 60 * protocol["cpu_minutes"]:
                facts = {"cpu_minutes": used_s / 60, "steps": steps, "wall_s": time.time() - began}
                print(f"plain loop: {steps} steps, {used_s / 60:.2f} CPU-minutes")
                return network.eval(), facts
            loss = pit_neg_si_sdr(network(batch["mixture"][:, None]), batch["sources"])[0].mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 5.0)
            optimizer.step()
            steps += 1
            if steps % 100 == 0:
                print(f"plain loop: step {steps}, loss {loss.item():.2f}, {used_s / 60:.1f} CPU-minutes", flush=True)
        epoch += 1
