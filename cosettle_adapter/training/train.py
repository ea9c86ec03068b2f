"""Trains a projection by gradient descent, as in the paper; runs resume bit for bit."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import logging
import shlex
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from cosettle_adapter.backbones import Backbone
from cosettle_adapter.projection import Projection
from cosettle_adapter.training import checkpoint
from cosettle_adapter.training.checkpoint import MetricsLog, RunState, StepReport, read_metrics
from cosettle_adapter.training.corpus import Corpus
from cosettle_adapter.training.data import Plan, TrainingPairs, load_batches
from cosettle_adapter.training.encoding import compile_encoder
from cosettle_adapter.training.errors import TrainingInterrupted, stop_request
from cosettle_adapter.training.head import Head, new_head
from cosettle_adapter.training.processes import from_main, gather, make_accelerator, on_main
from cosettle_adapter.training.settings import TrainSettings
from cosettle_adapter.training.step import Stepper
from cosettle_adapter.training.validation import CRITERION, Validation
from cosettle_adapter.version import __version__

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

_SAVE_SECONDS = 300.0
_SKIPPED_NAMED = 20


class Trained(NamedTuple):
    """Result of training."""

    projection: Projection  # the written one: the last, or the best by validation
    steps: int
    chosen_step: int
    figures: dict[str, dict[str, float | None]]  # of validation: raw, first, last, chosen
    skipped: dict[str, str]  # unreadable videos: reason


def train(
    backbone: Backbone,
    data: TrainingPairs,
    output: str | Path,
    settings: TrainSettings | None = None,
    *,
    accelerator: Accelerator | None = None,
    resume: bool = False,
    overwrite: bool = False,
    validation: Corpus | None = None,
    tensorboard: bool = False,
    licence: str = "",
    about_data: str = "",
    began: Mapping[str, Any] | None = None,
    on_start: Callable[[int], None] = lambda samples: None,
    on_step: Callable[[StepReport], None] = lambda report: None,
) -> Trained:
    """Train a projection for a backbone on unlabelled clips.

    The backbone stays frozen and moves to the accelerator's device. The run writes
    ``metrics.jsonl`` and a checkpoint into ``output``; resumed from it, an interrupted run gives an
    identical result. At the end the projection is written. Several processes started by
    ``accelerate launch`` or ``torchrun`` train one projection together; only the first writes.

    Args:
        backbone: the frozen encoder.
        data: from :func:`~cosettle_adapter.training.cached_views.open_data`, same settings.
        output: folder to write.
        settings: see :class:`TrainSettings`.
        accelerator: Accelerator of this process; by default for the best available device.
        resume: continue the run in ``output``.
        overwrite: remove a run or projection in ``output``.
        validation: clips to measure before the first step and after each epoch; the best projection
            by them is the result.
        tensorboard: write TensorBoard files as well as ``metrics.jsonl``.
        licence: licence to record; the backbone's by default.
        about_data: description of the clips to record.
        began: command and options to keep in the checkpoints for resuming; the config records
            ``command``, a list of words, of the run's first call.
        on_start: called in the main process with the samples per epoch, before the first step.
        on_step: called in the main process after every step.

    Raises:
        TrainingError: the folder holds a run, another process is writing into it, or there are too
            few samples.
        CheckpointError: there is no run to resume, or it has other settings.
        NonFiniteLossError, DiskFullError: the last checkpoint is kept.
        WorkerEndedError: a process that decodes videos died; the last checkpoint is kept.
        TrainingInterrupted: Ctrl-C or SIGTERM, after saving.
        CosettleError: unreadable samples, or frames that do not fit the backbone.
    """
    settings = settings or TrainSettings()
    accelerator = accelerator or make_accelerator()
    folder = Path(output).expanduser()
    run = _Run(accelerator, backbone, data, settings, folder, new=not resume)
    run.state.config["validation"] = validation and validation.digest
    run.state.began = dict(began or {})
    with contextlib.ExitStack() as stack:
        claimed = checkpoint.claimed_folder(folder, resume=resume, overwrite=overwrite)
        on_main(accelerator, lambda: stack.enter_context(claimed))
        # Otherwise the accelerator would save this head in the checkpoints of its next run.
        stack.callback(accelerator.free_memory)
        if resume:
            run.resume()
        if settings.compile:
            compile_encoder(backbone)
        if validation is not None:
            run.validation = on_main(accelerator, lambda: run.start_validation(validation))
        run.log = on_main(
            accelerator, lambda: MetricsLog(folder, step=run.state.step, tensorboard=tensorboard)
        )
        if run.log is not None:
            stack.callback(run.log.close)
        run.run_steps(on_start, on_step)
        return run.finish(licence or backbone.row.licence, about_data)


class _Run:
    """A head and its training state after ``state.step`` steps."""

    def __init__(
        self,
        accelerator: Accelerator,
        backbone: Backbone,
        data: TrainingPairs,
        settings: TrainSettings,
        folder: Path,
        *,
        new: bool,
    ) -> None:
        self.accelerator, self.backbone, self.data = accelerator, backbone, data
        self.settings, self.folder = settings, folder
        self.plan = Plan(len(data), accelerator.num_processes, settings)
        if self.plan.batch_size < settings.batch_size and accelerator.is_main_process:
            message = "batch size lowered from %d to %d, because an epoch has only %d samples"
            logger.warning(message, settings.batch_size, self.plan.batch_size, len(data))
        init = settings.init if new else "random"
        config = settings.head_config(backbone)
        self.head = Head(new_head(config, init=init, seed=settings.seed)).to(accelerator.device)
        backbone.to(accelerator.device)
        self.stepper = Stepper(accelerator, backbone, data, self.plan, settings, self.head)
        self.state = RunState(
            config={  # decides the result, so it must not change on resuming
                "backbone": backbone.row.name,
                "fingerprint": backbone.fingerprint,
                "backbone_dtype": str(backbone.dtype),
                "stride": backbone.stride,
                "settings": settings.decisive(),
                "samples_per_step": self.plan.samples_per_step,
                "data": data.digest,
            },
            skipped=dict(getattr(data, "skipped", ())),
        )
        self.best: dict[str, Tensor] | None = None
        self.log: MetricsLog | None = None  # in the main process only
        self.validation: Validation | None = None  # in the main process only
        self._saved_at = time.monotonic()

    def resume(self) -> None:
        """Restore the last checkpoint; options of this call apply to later resumed runs too."""
        skipped, began = self.state.skipped, self.state.began
        self.state, self.best = checkpoint.restore(self.accelerator, self.folder, self.state.config)
        self.state.skipped |= skipped
        command = {k: v for k, v in self.state.began.items() if k == "command"}
        self.state.began = {**self.state.began, **began, **command}

    def run_steps(
        self, on_start: Callable[[int], None], on_step: Callable[[StepReport], None]
    ) -> None:
        """Run the remaining steps."""
        plan, settings, accelerator, state = self.plan, self.settings, self.accelerator, self.state
        batches = load_batches(
            self.data,
            plan.batches(accelerator.process_index, start=state.step),
            workers=settings.workers,
            pin_memory=accelerator.device.type == "cuda",
        )
        with stop_request() as stop_requested:
            if state.step == 0:
                on_main(accelerator, self.validate)
                self.save()
            if self.log is not None and state.step < plan.steps:
                on_start(plan.samples)
            for step in range(state.step, plan.steps):
                overdue = time.monotonic() - self._saved_at > _SAVE_SECONDS
                report, stop, save = self.stepper.run(
                    step, batches, stop=stop_requested(), save=overdue
                )
                state.step = step + 1
                if self.log is not None:
                    if state.step % settings.log_every == 0 or state.step == plan.steps:
                        self.log.write_step(report)
                    on_step(report)
                epoch_ends = state.step % plan.steps_per_epoch == 0
                if epoch_ends:
                    on_main(accelerator, self.validate)
                # A single process can also obey a signal that arrived during the step.
                stop = stop or (accelerator.num_processes == 1 and stop_requested())
                every = settings.save_every
                scheduled = every is not None and state.step % every == 0
                if epoch_ends or scheduled or save or stop:
                    self.save()
                if stop and state.step < plan.steps:
                    raise TrainingInterrupted(
                        f"stopped after step {state.step} of {plan.steps}, which is saved; "
                        f"continue with --resume {self.folder}"
                    )

    def save(self) -> None:
        """Write a checkpoint; all processes call it."""
        for skipped in gather(self.accelerator, self.stepper.skipped):
            self.state.skipped |= skipped
        checkpoint.save(self.accelerator, self.folder, self.state, self.best)
        self._saved_at = time.monotonic()

    def start_validation(self, corpus: Corpus) -> Validation:
        """Encode the validation clips and measure the backbone's tokens."""
        config, size, seed = self.head.projection.config, self.settings.size, self.settings.seed
        validation = Validation(self.backbone, corpus, config, size=size, seed=seed)
        self.state.figures.setdefault("raw", validation.measure(None))
        for name, reason in validation.skipped.items():
            logger.warning("skipped the validation clip %s: %s", name, reason)
        return validation

    def validate(self) -> None:
        """Measure the current projection and keep it if it is the best so far."""
        state = self.state
        if self.validation is None or self.log is None:
            return
        figures = self.validation.measure(self.head.projection)
        state.figures.setdefault("first", figures)
        state.figures["last"] = figures
        score = figures[CRITERION] or 0.0
        if state.best is None or score > (state.best["figures"][CRITERION] or 0.0):
            state.best = {"step": state.step, "figures": figures}
            self.best = self._tensors()
        raw = {"raw": state.figures["raw"]} if state.step == 0 else {}
        line: dict[str, Any] = {"epoch": state.step // self.plan.steps_per_epoch}
        for prefix, values in {**raw, "validation": figures}.items():
            line |= {f"{prefix}/{name}": value for name, value in values.items()}
        self.log.write(state.step, line)

    def finish(self, licence: str, about_data: str) -> Trained:
        """Write the result in the main process; return it in all processes."""
        state, best = from_main(self.accelerator, (self.state, self.best))
        chosen, figures = state.step, dict(state.figures)
        if state.best is not None:
            chosen, figures["chosen"] = state.best["step"], state.best["figures"]
        record = self._record(chosen, figures, about_data)
        config = self.head.projection.config
        with torch.random.fork_rng(devices=[]):
            projection = Projection(dataclasses.replace(config, fit=record, licence=licence))
        projection.load_state_dict(self._tensors() if best is None else best)
        projection.requires_grad_(False).eval()
        on_main(self.accelerator, lambda: checkpoint.write_result(self.folder, projection))
        return Trained(projection, state.step, chosen, figures, state.skipped)

    def _tensors(self) -> dict[str, Tensor]:
        state = self.head.projection.state_dict()
        return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}

    def _record(
        self, chosen: int, figures: dict[str, dict[str, float | None]], about_data: str
    ) -> dict[str, Any]:
        """Return ``config.fit`` of the trained projection."""
        plan, skipped = self.plan, sorted(Path(name).name for name in self.state.skipped)
        record: dict[str, Any] = {"method": "train", "data": about_data, "clips": self.data.clips}
        if skipped:
            record |= {"skipped": len(skipped), "skipped_clips": skipped[:_SKIPPED_NAMED]}
        lines = [line for line in read_metrics(self.folder) if "loss" in line]
        last = [line for line in lines if line["epoch"] == lines[-1]["epoch"]]
        record |= {
            "samples_per_epoch": plan.samples,
            "steps": plan.steps,
            "samples_per_step": plan.samples_per_step,
            "processes": self.accelerator.num_processes,
            "device": self.accelerator.device.type,
            "stride": self.backbone.stride,
            "settings": self.settings.decisive() | {"init": Path(self.settings.init).name},
            "last_epoch": {
                name: round(sum(line[name] for line in last) / len(last), 4)
                for name in (("loss", "cycle", "separability", "accuracy") if last else ())
            },
        }
        if figures:
            record["validation"] = {
                name: {key: None if v is None else round(v, 4) for key, v in measured.items()}
                for name, measured in figures.items()
            }
            record["chosen_by"] = f"{CRITERION} of propagated masks on rendered clips"
            record["chosen_step"] = chosen
        packages = ("torch", "timm", "accelerate")
        record["versions"] = {name: importlib.metadata.version(name) for name in packages}
        record["cosettle_adapter"] = __version__
        if words := self.state.began.get("command"):
            record["command"] = shlex.join(["cosettle-adapter", *map(_without_folder, words)])
        return record


def _without_folder(word: str) -> str:
    """Shorten an absolute path in a word of a command line to its name, for privacy."""
    option, equals, value = word.rpartition("=")
    path = Path(value).expanduser()
    return f"{option}{equals}{path.name if path.is_absolute() else value}"
