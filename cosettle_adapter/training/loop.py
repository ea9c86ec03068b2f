"""Train a projection by gradients: the paper's method, resumable bit for bit."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cosettle_adapter.backbones import Backbone
from cosettle_adapter.training.batches import Plan, StepBatches, TrainingData, load_batches
from cosettle_adapter.training.compilation import compile_encoder
from cosettle_adapter.training.distribution import make_accelerator, on_main
from cosettle_adapter.training.errors import TrainingInterrupted
from cosettle_adapter.training.head import Head, new_head
from cosettle_adapter.training.metrics_log import MetricsLog, StepReport
from cosettle_adapter.training.result import prepared_folder
from cosettle_adapter.training.run import Run, Trained
from cosettle_adapter.training.schedule import make_optimizer
from cosettle_adapter.training.settings import TrainSettings
from cosettle_adapter.training.setup import Setup
from cosettle_adapter.training.step import Stepper, StepResult
from cosettle_adapter.training.stopping import stop_request
from cosettle_adapter.training.validation import Validation

if TYPE_CHECKING:
    from accelerate import Accelerator

    from cosettle_adapter.training.corpora.corpus import Corpus

__all__ = ["StepReport", "Trained", "train"]

logger = logging.getLogger(__name__)


def train(
    backbone: Backbone,
    data: TrainingData,
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
    command: Sequence[str] = (),
    on_start: Callable[[int], None] = lambda samples: None,
    on_step: Callable[[StepReport], None] = lambda report: None,
) -> Trained:
    """Train a projection for a backbone on unlabelled clips.

    The backbone stays frozen and moves to the accelerator's device. ``output`` becomes a
    projection folder when the run ends; until then it holds ``checkpoint.pt``, from which an
    interrupted run goes on as if nothing had happened, and ``metrics.jsonl``. Several processes
    train one projection together when they were launched by ``accelerate launch`` or
    ``torchrun``; only the first writes.

    Args:
        backbone: the frozen encoder.
        data: samples, from :func:`~cosettle_adapter.training.data.open_data` with the same
            settings.
        output: folder to write.
        settings: see :class:`TrainSettings`.
        accelerator: of this process; by default one for the best device here.
        resume: go on with the run in ``output``.
        overwrite: remove a run or projection that ``output`` holds.
        validation: clips to measure before the first step and after each epoch; the projection
            that is best by them is the result.
        tensorboard: write TensorBoard's files beside ``metrics.jsonl``.
        licence: licence to record; the backbone's by default.
        about_data: what the clips are, to record.
        command: words of the command line, to record.
        on_start: called in the main process before the first step that is to be done, with the
            samples of an epoch.
        on_step: called in the main process after every step.

    Returns:
        The projection, and what was measured.

    Raises:
        TrainingError: it cannot begin: the folder holds a run, another process is writing into it,
            or there are too few samples.
        CheckpointError: there is nothing to resume, or it is another run.
        NonFiniteLossError: naming the clips; the last checkpoint is kept.
        DiskFullError: no space left; the last checkpoint is kept.
        TrainingInterrupted: Ctrl-C or SIGTERM, after saving.
        CosettleError: samples that cannot be read, or frames that do not fit the backbone.
    """
    settings = settings or TrainSettings()
    accelerator = accelerator or make_accelerator()
    folder = Path(output).expanduser()
    backbone.grid(settings.size, settings.size)
    plan = Plan.of(
        len(data),
        batch_size=settings.batch_size,
        processes=accelerator.num_processes,
        accumulation=settings.accumulation,
        epochs=settings.epochs,
        seed=settings.seed,
    )
    if plan.batch_size < settings.batch_size and accelerator.is_main_process:
        logger.warning(
            "batches of %d in place of %d: an epoch has %d samples",
            plan.batch_size,
            settings.batch_size,
            plan.samples,
        )
    config = dataclasses.replace(
        settings.head_config(backbone), licence=licence or backbone.row.licence
    )
    start = "random" if resume else settings.init
    head = Head(new_head(config, init=start, seed=settings.seed)).to(accelerator.device)
    with contextlib.ExitStack() as held:
        prepared = prepared_folder(folder, resume=resume, overwrite=overwrite)
        on_main(accelerator, lambda: held.enter_context(prepared))
        setup = Setup(
            accelerator,
            backbone,
            data,
            folder,
            plan,
            settings,
            validation_digest=None if validation is None else validation.digest,
            about_data=about_data,
            command=tuple(command),
        )
        optimizer, scheduler = make_optimizer(
            head, settings, samples=plan.samples_per_step, steps_per_epoch=plan.steps_per_epoch
        )
        run = Run(setup, head, optimizer, scheduler)
        run.skipped.update(getattr(data, "skipped", ()))
        if resume:
            run.restore()
        backbone.to(accelerator.device)
        if settings.compile:
            compile_encoder(backbone)
        stepper = Stepper(setup, head, optimizer, scheduler, run.skipped)
        if validation is not None:
            clips = validation
            size, seed = settings.size, settings.seed
            run.begin_validation(lambda: Validation(backbone, clips, config, size=size, seed=seed))
        log = on_main(
            accelerator, lambda: MetricsLog(folder, step=run.step, tensorboard=tensorboard)
        )
        try:
            _run_to_the_end(run, stepper, log, on_start, on_step)
        finally:
            if log is not None:
                log.close()
        return run.finish()


def _run_to_the_end(
    run: Run,
    stepper: Stepper,
    log: MetricsLog | None,
    on_start: Callable[[int], None],
    on_step: Callable[[StepReport], None],
) -> None:
    """Do the steps that are left; ``log`` is ``None`` in all processes but the first."""
    setup = run.setup
    plan, settings, accelerator = setup.plan, setup.settings, setup.accelerator
    batches = load_batches(
        setup.data,
        StepBatches(plan, rank=accelerator.process_index, start=run.step),
        workers=settings.workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    with stop_request() as request:
        if run.step == 0:
            _validate(run, log, epoch=0)
            run.save()
        if log is not None and run.step < plan.steps:
            on_start(plan.samples)
        for step in range(run.step, plan.steps):
            began = time.monotonic()
            result = stepper.run(
                step, batches, stop=request.signal is not None, save=run.wants_save()
            )
            run.step = step + 1
            epoch, within = divmod(run.step, plan.steps_per_epoch)
            if log is not None:
                seconds = max(time.monotonic() - began, 1e-9)
                report = _report(run, result, plan.samples_per_step / seconds)
                if run.step % settings.log_every == 0 or run.step == plan.steps:
                    log.write_report(report)
                on_step(report)
            if within == 0:
                _validate(run, log, epoch=epoch)
            # A signal that came after the processes agreed counts at once where there is one.
            stop = result.stop or (accelerator.num_processes == 1 and request.signal is not None)
            due = settings.save_every is not None and run.step % settings.save_every == 0
            if within == 0 or due or result.save or stop:
                run.save()
            if stop and run.step < plan.steps:
                raise TrainingInterrupted(
                    f"stopped after step {run.step} of {plan.steps}, which is saved; go on with "
                    f"--resume {setup.folder}"
                )


def _validate(run: Run, log: MetricsLog | None, *, epoch: int) -> None:
    figures = run.validate()
    if log is not None and figures:
        if run.step == 0:
            log.write(0, {"epoch": 0} | _prefixed("raw", run.figures["raw"]))
        log.write(run.step, {"epoch": epoch} | _prefixed("validation", figures))


def _prefixed(prefix: str, figures: dict[str, float | None]) -> dict[str, float | None]:
    return {f"{prefix}/{name}": value for name, value in figures.items()}


def _report(run: Run, result: StepResult, clips_per_second: float) -> StepReport:
    plan = run.setup.plan
    return StepReport(
        step=run.step,
        steps=plan.steps,
        epoch=(run.step - 1) // plan.steps_per_epoch + 1,
        loss=result.loss,
        cycle=result.cycle,
        kl=result.separability,
        accuracy=result.accuracy,
        lr=result.lr,
        grad_norm=result.grad_norm,
        clips_per_second=clips_per_second,
    )
