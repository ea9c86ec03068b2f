"""The command ``evaluate``: raw, centred and adapted features side by side in one run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from cosettle_adapter import evaluation
from cosettle_adapter.cli.common import Size, console, frame_progress
from cosettle_adapter.cli.evaluate_videos import (
    FeatureOptions,
    classification,
    localisation,
    representation,
    retrieval,
)
from cosettle_adapter.cli.tables import terminal_table
from cosettle_adapter.errors import FrameError
from cosettle_adapter.evaluation.joint_clips import QueryFrames
from cosettle_adapter.evaluation.point_clips import PointProtocolName
from cosettle_adapter.evaluation.protocols import DEFAULT, JointRule, LabelPropagation, Propagation
from cosettle_adapter.evaluation.run import Protocol
from cosettle_adapter.evaluation.tables import result_notes, result_tables
from cosettle_adapter.evaluation.variants import feature_variants
from cosettle_adapter.video import FrameSelection

app = App(
    name="evaluate",
    help="Evaluate a model on a benchmark: raw, centred and adapted features side by side.",
    default_parameter=Parameter(negative=(), consume_multiple=True),
)
for _command in (representation, classification, retrieval, localisation):
    app.command(_command)


@Parameter(name="*")
@dataclasses.dataclass(frozen=True)
class ClipOptions(FeatureOptions):
    """Options of the benchmarks on annotated clips.

    Attributes:
        clips: names of the clips; all by default.
        size: size of the encoded frames: shorter side, or HEIGHTxWIDTH; the protocol's by default.
        settle: also score the features settled by each clip's own statistics.
        centre: also score the adapted features minus the clip's mean token.
        baseline_layers: also score these single layers minus the clip's mean token.
        temporal_fusion: also score the adapted features, and those of --baseline-layers, fused
            over time.
        save_predictions: folder for predicted masks or positions.
        explain: only print the protocol: all settings, besides model and data, that affect the
            scores; needs no --data.
    """

    clips: Sequence[str] | None = None
    size: Size | None = None
    settle: bool = False
    centre: bool = False
    baseline_layers: Sequence[int] = ()
    temporal_fusion: Literal["symmetric", "causal"] | None = None
    save_predictions: Path | None = None
    explain: bool = False

    def source(self, data: Path | None) -> Path:
        """Return the data folder, or a placeholder with ``explain``."""
        if data is None and not self.explain:
            raise FrameError("--data is missing; only --explain works without it")
        return data or Path("--data")

    def run(self, protocol: Protocol[Any]) -> int:
        """Evaluate with a progress bar and print the tables; return the exit status."""
        if self.explain:
            settings = {"data set": protocol.name, **protocol.settings}
            settings |= {"size": self.size} if self.size else {}
            for name, value in settings.items():
                console().print(f"{name:16}{value}", markup=False, highlight=False, soft_wrap=True)
            return 0
        clips = protocol.clips()  # a wrong folder fails before a model is loaded
        output, adapter = console(), self.adapter()
        variants = feature_variants(
            adapter,
            baselines=self.projections(),
            settle=self.settle or None,
            centre=self.centre,
            baseline_layers=self.baseline_layers,
            fusion=self.temporal_fusion,
        )
        with frame_progress(output) as progress:
            bar = progress.add_task(protocol.name, total=None, rate="")
            result = evaluation.evaluate(
                dataclasses.replace(protocol, clips=lambda: clips),
                adapter,
                variants,
                model=self.model,
                output=self.output,
                predictions=self.save_predictions,
                size=self.size,
                batch_size=self.batch_size,
                on_clip=lambda done, total, name: progress.update(
                    bar, completed=done, total=total, rate=name
                ),
            )
        for table in result_tables(result):
            output.print(terminal_table(table, compact=True))
        for name, reason in result.failed.items():
            output.print(f"not scored: {name}: {reason}", markup=False, style="red", soft_wrap=True)
        for line in result_notes(result):
            output.print(line, markup=False, soft_wrap=True)
        if self.output:
            output.print(f"results in {self.output}", markup=False)
        return 1 if result.failed else 0


DEFAULTS = ClipOptions()
Labels = Annotated[Propagation, Parameter(name="*")]
JointLabels = Annotated[LabelPropagation, Parameter(name="*")]


@app.command
def davis(
    *,
    data: Sequence[Path] = (),
    year: Literal["2016", "2017"] | None = None,
    every: Sequence[int] = (1,),
    max_frames: int | None = None,
    labels: Labels = DEFAULT,
    options: ClipOptions = DEFAULTS,
) -> int:
    """Video object segmentation on DAVIS.

    Args:
        data: folder of DAVIS, or several, which are parts of the data: the raw layer that a clip
            is compared with is chosen on the other parts.
        year: release of DAVIS; 2016 merges all objects into one. By default the newest available.
        every: keep every n-th frame; one number for all folders or one for each.
        max_frames: keep at most this many frames of a clip.
    """
    select = [FrameSelection(every=step, max_frames=max_frames) for step in every]
    folders = list(data) or [options.source(None)]
    protocol = evaluation.davis_protocol(
        *folders, clips=options.clips, select=select, year=year, propagation=labels
    )
    return options.run(protocol)


@app.command
def folder(
    *,
    data: Path | None = None,
    late_labels: Literal["error", "keep"] = "error",
    labels: Labels = DEFAULT,
    options: ClipOptions = DEFAULTS,
) -> int:
    """Video object segmentation on your own frames and masks.

    Args:
        data: folder with frames/ and masks/, or folder of such folders.
        late_labels: treatment of labels that are not in the first mask: an error, or keep them and
            score them as in DAVIS, as missed objects.
    """
    protocol = evaluation.folder_protocol(
        options.source(data), clips=options.clips, late_labels=late_labels, propagation=labels
    )
    return options.run(protocol)


@app.command
def vip(
    *, data: Path | None = None, labels: Labels = DEFAULT, options: ClipOptions = DEFAULTS
) -> int:
    """Propagation of body parts and clothes on VIP.

    Args:
        data: folder VIP_Fine of VIP.
    """
    protocol = evaluation.vip_protocol(
        options.source(data), clips=options.clips, propagation=labels
    )
    return options.run(protocol)


@app.command
def jhmdb(
    *,
    data: Path | None = None,
    joints: JointRule = "published",
    labels: JointLabels = DEFAULT,
    options: ClipOptions = DEFAULTS,
) -> int:
    """Propagation of human joints on JHMDB.

    Args:
        data: folder of JHMDB, or folder of clips with keypoints.json.
        joints: assignment of joints to patches: rounded as in published code, or exact (geometric).
    """
    protocol = evaluation.jhmdb_protocol(
        options.source(data), clips=options.clips, joints=joints, propagation=labels
    )
    return options.run(protocol)


@app.command
def badja(
    *,
    data: Path | None = None,
    davis: Path | None = None,
    query_frames: QueryFrames = "published",
    options: ClipOptions = DEFAULTS,
) -> int:
    """Tracking of animal joints on BADJA.

    Args:
        data: folder of BADJA, or folder of clips with keypoints.json.
        davis: folder of DAVIS with the frames; DAVIS in the data folder by default.
        query_frames: whether the frame in which a joint is queried counts: unless it is the clip's
            first, as in published code, or never (strict).
    """
    protocol = evaluation.badja_protocol(
        options.source(data), clips=options.clips, davis=davis, query_frames=query_frames
    )
    return options.run(protocol)


@app.command
def tapvid(
    *,
    data: Path | None = None,
    mode: Literal["first", "strided"] = "first",
    protocol: PointProtocolName = "best",
    options: ClipOptions = DEFAULTS,
) -> int:
    """Tracking of points on TAP-Vid.

    Args:
        data: pickle file of TAP-Vid, or folder of them.
        mode: frames in which points are queried: where first visible, or every fifth frame.
        protocol: resizing of frames and tracking of points: this package's (best), or those of the
            paper Chrono (chrono; compare delta_avg only).
    """
    chosen = evaluation.tapvid_protocol(
        options.source(data), clips=options.clips, mode=mode, protocol=protocol
    )
    return options.run(chosen)


@app.command
def rendered(*, data: Path | None = None, options: ClipOptions = DEFAULTS) -> int:
    """Matching and drift on clips rendered from photographs, whose motion is known exactly.

    Args:
        data: folder of photographs; the photographs of scikit-image by default.
    """
    return options.run(evaluation.rendered_protocol(data, clips=options.clips))
