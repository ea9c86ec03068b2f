"""What two processes do together in ``test_processes``; every file it writes is looked at there."""

from __future__ import annotations

import dataclasses
import signal
import sys
from pathlib import Path

import torch
from training_fakes import QUICK, SMALL_CLIP, SMALL_VIT, FakeData, small_backbone

from cosettle_adapter.training.data import Sample
from cosettle_adapter.training.errors import TrainingError, TrainingInterrupted
from cosettle_adapter.training.processes import make_accelerator
from cosettle_adapter.training.train import StepReport, train

# two processes with half of QUICK's batch
HALF = dataclasses.replace(QUICK, batch_size=2)


def run(folder: Path) -> None:
    torch.set_num_threads(1)
    accelerator = make_accelerator("cpu")
    rank = accelerator.process_index
    vit, clip = small_backbone(SMALL_VIT), small_backbone(SMALL_CLIP)

    def note(name: str, text: str) -> None:
        (folder / f"{name}-{rank}.txt").write_text(text)

    note("processes", str(accelerator.num_processes))
    train(vit, FakeData(), folder / "vit", HALF, accelerator=accelerator)
    quarter = dataclasses.replace(HALF, batch_size=1, accumulation=2, epochs=1)
    train(clip, FakeData(), folder / "clip", quarter, accelerator=accelerator)

    class Interrupting(FakeData):
        """Ask the second process alone to stop, in the middle of a step."""

        def __getitem__(self, key: tuple[int, int]) -> Sample:
            if rank == 1 and len(self.seen) == 9:
                signal.raise_signal(signal.SIGTERM)
            return super().__getitem__(key)

    steps: list[int] = []

    def count(report: StepReport) -> None:
        steps.append(report.step)

    try:
        train(vit, Interrupting(), folder / "stopped", HALF, accelerator=accelerator, on_step=count)
    except TrainingInterrupted as stopped:
        note("stopped", str(stopped))
    note("steps", str(len(steps)))

    for name, data in {"nan": FakeData(broken=(7,)), "missing": FakeData(missing=(7,))}.items():
        try:
            train(vit, data, folder / name, HALF, accelerator=accelerator)
        except (TrainingError, ValueError) as error:
            note(name, str(error))
    accelerator.end_training()


if __name__ == "__main__":
    run(Path(sys.argv[1]))
