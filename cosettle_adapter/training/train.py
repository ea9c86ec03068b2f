"""Train a projection by gradients: the paper's method, resumable bit for bit."""

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
    """What training returns."""

    projection: Projection  # as it was written: the last one, or the best by validation
    steps: int
    chosen_step: int
    figures: dict[str, dict[str, float | None]]  # by validation: raw, first, last, chosen
    skipped: dict[str, str]  # videos that could not be read, and why


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

    The backbone stays frozen and moves to the accelerator's device. ``output`` becomes a
    projection folder when the run ends; until then it holds a checkpoint, from which an
    interrupted run resumes with an identical result, and ``metrics.jsonl``. Several processes
    train one projection together when they were launched by ``accelerate launch`` or
    ``torchrun``; only the first writes.

    Args:
        backbone: the frozen encoder.
        data: from :func:`~cosettle_adapter.training.cached_views.open_data`, same settings.
        output: folder to write.
        settings: see :class:`TrainSettings`.
        accelerator: of this process; by default one for the best device here.
        resume: continue the run in ``output``.
        overwrite: remove a run or projection that ``output`` holds.
        validation: clips to measure before the first step and after each epoch; the projection
            that is best by them is the result.
        tensorboard: write TensorBoard's files beside ``metrics.jsonl``.
        licence: to record; the backbone's by default.
        about_data: what the clips are, to record.
        began: how the run was begun, kept in its checkpoints; ``command``, its words, is recorded.
        on_start: called in the main process with the samples of an epoch, before the first step.
        on_step: called in the main process after every step.

    Raises:
        TrainingError: it cannot begin: the folder holds a run, another process is writing into it,
            or there are too few samples.
        CheckpointError: there is nothing to resume, or it is another run.
        NonFiniteLossError, DiskFullError: the last checkpoint is kept.
        TrainingInterrupted: Ctrl-C or SIGTERM, after saving.
        CosettleError: samples that cannot be read, or frames that do not fit the backbone.
    """
    settings = settings or TrainSettings()
    accelerator = accelerator or make_accelerator()
    folder = Path(output).expanduser()
    run = _Run(accelerator, backbone, data, settings, folder, new=not resume)
    run.state.config["validation"] = validation and validation.digest
    run.state.began = dict(began or {})
    with contextlib.ExitStack() as held:
        claimed = checkpoint.claimed_folder(folder, resume=resume, overwrite=overwrite)
        on_main(accelerator, lambda: held.enter_context(claimed))
        held.callback(accelerator.free_memory)  # it would save this head with the next one
        if resume:
            run.resume()
        if settings.compile:
            compile_encoder(backbone)
        if validation is not None:
            run.validation = on_main(accelerator, lambda: run.begin_validation(validation))
        run.log = on_main(
            accelerator, lambda: MetricsLog(folder, step=run.state.step, tensorboard=tensorboard)
        )
        if run.log is not None:
            held.callback(run.log.close)
        run.to_the_end(on_start, on_step)
        return run.finish(licence or backbone.row.licence, about_data)


class _Run:
    """The head and what trains it, after ``state.step`` steps."""

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
            told = "batches of %d in place of %d: an epoch has %d samples"
            logger.warning(told, self.plan.batch_size, settings.batch_size, len(data))
        init = settings.init if new else "random"
        config = settings.head_config(backbone)
        self.head = Head(new_head(config, init=init, seed=settings.seed)).to(accelerator.device)
        backbone.to(accelerator.device)
        self.stepper = Stepper(accelerator, backbone, data, self.plan, settings, self.head)
        self.state = RunState(
            config={  # what decides the result, and so must be the same on resuming
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
        self.log: MetricsLog | None = None  # in the main process, as is the next
        self.validation: Validation | None = None
        self._saved_at = time.monotonic()

    def resume(self) -> None:
        skipped, began = self.state.skipped, self.state.began
        self.state, self.best = checkpoint.restore(self.accelerator, self.folder, self.state.config)
        self.state.skipped |= skipped
        self.state.began = self.state.began or began

    def to_the_end(
        self, on_start: Callable[[int], None], on_step: Callable[[StepReport], None]
    ) -> None:
        """Do the steps that are left."""
        plan, settings, accelerator, state = self.plan, self.settings, self.accelerator, self.state
        batches = load_batches(
            self.data,
            plan.batches(accelerator.process_index, start=state.step),
            workers=settings.workers,
            pin_memory=accelerator.device.type == "cuda",
        )
        with stop_request() as asked_to_stop:
            if state.step == 0:
                on_main(accelerator, self.validate)
                self.save()
            if self.log is not None and state.step < plan.steps:
                on_start(plan.samples)
            for step in range(state.step, plan.steps):
                old = time.monotonic() - self._saved_at > _SAVE_SECONDS
                asked = asked_to_stop()
                report, stop, save = self.stepper.run(step, batches, stop=asked, save=old)
                state.step = step + 1
                if self.log is not None:
                    if state.step % settings.log_every == 0 or state.step == plan.steps:
                        self.log.write_step(report)
                    on_step(report)
                epoch_ends = state.step % plan.steps_per_epoch == 0
                if epoch_ends:
                    on_main(accelerator, self.validate)
                # A signal that came after the processes agreed counts at once if there is one.
                stop = stop or (accelerator.num_processes == 1 and asked_to_stop())
                due = settings.save_every is not None and state.step % settings.save_every == 0
                if epoch_ends or due or save or stop:
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

    def begin_validation(self, corpus: Corpus) -> Validation:
        """Encode the validation clips, and measure the backbone's tokens."""
        config, settings = self.head.projection.config, self.settings
        found = Validation(self.backbone, corpus, config, size=settings.size, seed=settings.seed)
        self.state.figures.setdefault("raw", found.measure(None))
        for name, reason in found.skipped.items():
            logger.warning("validation without %s: %s", name, reason)
        return found

    def validate(self) -> None:
        """Measure the projection as it is now, and keep it if it is the best so far."""
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
        """Write the result, in the main process; all processes get the projection."""
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
        """Return ``config.fit``: how the projection was found."""
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
                for name in (("loss", "cycle", "kl", "accuracy") if last else ())
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
            record["command"] = shlex.join(["cosettle-adapter", *map(_without_place, words)])
        return record


def _without_place(word: str) -> str:
    """Leave out of a word of a command line where a path lies on somebody's machine."""
    option, equals, value = word.rpartition("=")
    path = Path(value).expanduser()
    return f"{option}{equals}{path.name if path.is_absolute() else value}"
