"""The command ``export``: a model to an ONNX or torch.export file."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

from cyclopts import Parameter

from cosettle_adapter.cli.common import DEFAULT_MODEL, ModelOptions, Output, console
from cosettle_adapter.export import onnx, to_onnx, to_torch_export
from cosettle_adapter.video import FrameSelection, open_frames


@Parameter(name="*")
@dataclasses.dataclass(frozen=True)
class Loading(ModelOptions):
    """How to load the model, whose name is a positional argument."""

    model: Annotated[str, Parameter(parse=False)] = DEFAULT_MODEL


def export(
    model: str,
    /,
    *,
    size: tuple[int, int] | None = None,
    output: Output,
    loading: Loading = Loading(),
    no_preprocessing: bool = False,
    normalize: bool = False,
    layer: int | None = None,
    static_batch: int | None = None,
    check_on: str | None = None,
    no_check: bool = False,
    overwrite: bool = False,
) -> None:
    """Write a model as an ONNX or torch.export file, for frames of one size or of any size.

    Args:
        model: registered name, Hub repository or folder; with --layer, any backbone.
        size: height and width of the frames in pixels, both whole numbers of patches. By default
            the file accepts all such sizes from 3 x 3 patches; not for models of feature maps.
        output: file to write: .onnx, or .pt2 (torch.export), which runs on --device only.
        no_preprocessing: take normalised float32 images as input in place of uint8 frames.
        normalize: scale features to unit length.
        layer: export the patch tokens of this layer, without the projection.
        static_batch: fixed batch size; any by default.
        check_on: video whose frames the exported file is compared with PyTorch on; by default
            rendered frames.
        no_check: do not compare the exported file with PyTorch.
        overwrite: replace an existing file.
    """
    if output.suffix not in (".onnx", ".pt2"):
        raise ValueError(
            f"got {output}, expected an output file with the suffix .onnx or .pt2 (torch.export)"
        )
    if output.exists() and not overwrite:
        raise FileExistsError(f"{output} exists already; give --overwrite to replace it")
    if no_check and check_on is not None:
        raise ValueError("--check-on and --no-check contradict each other; leave one out")
    if output.suffix == ".onnx":
        onnx.check_exporter()
    frames: Any = None
    if check_on is not None:
        frames = next(open_frames(check_on, FrameSelection(max_frames=3))).frames
    out = console()
    with out.status(f"loading {model}"):
        adapter = dataclasses.replace(loading, model=model).load(layer=layer)
    with out.status(f"exporting {model}"):
        exported = (to_onnx if output.suffix == ".onnx" else to_torch_export)(
            adapter,
            output,
            size,
            preprocessing=not no_preprocessing,
            normalize=normalize,
            static_batch=static_batch,
            check=not no_check,
            check_on=frames,
        )
    values = "RGB, 0 to 255"
    if no_preprocessing:
        values = f"RGB, (x - {exported.metadata['mean']}) / {exported.metadata['std']}"
    unchecked = "not checked" if no_check else "not checked: pip install onnxruntime"
    for line in (
        f"{exported.path}  {exported.size / 1e6:.1f} MB",
        f"input   {exported.input}  {values}",
        f"output  {exported.output}",
        f"parity  {exported.parity or unchecked}",
    ):
        out.print(line, markup=False, highlight=False, soft_wrap=True)
