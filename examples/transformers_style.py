"""Use an adapter like an image processor and a model of Hugging Face's transformers.

Try: python examples/transformers_style.py
     python examples/transformers_style.py --size 280 392

    inputs = processor(images=frames, return_tensors="pt")
    outputs = model(**inputs)
    outputs.last_hidden_state  # (B, h * w, C)

Code written for `AutoImageProcessor` and `AutoModel` keeps working; transformers itself is not
needed. Unlike most vision models there, this one returns no class token before the patches, and it
accepts any size of whole patches. As a comparison, the script matches each token of the first frame
of a rendered clip with those of the frame 11 later. The raw tokens are those of a layer that the
projection reads; on this clip more of their matches are right.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.video import as_frames, photographs, render_clip


@dataclasses.dataclass
class AdaptedOutput:
    """Output like `BaseModelOutput`: access by name, or by position as in ``outputs[0]``."""

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None

    def __getitem__(self, index: int) -> Any:
        return (self.last_hidden_state, self.hidden_states)[index]


class AdaptedImageProcessor:
    """Converts images to ``pixel_values``; resizes to ``size`` without cropping."""

    def __init__(self, adapter: CoSettleAdapter, size: tuple[int, int] | None = None) -> None:
        self.adapter = adapter
        self.size = size

    def __call__(self, images: Any, return_tensors: str = "pt") -> dict[str, Tensor]:
        """Convert one or several PIL images, arrays or tensors to ``(B, 3, H, W)``."""
        if return_tensors != "pt":
            raise ValueError(f"expected return_tensors='pt', got {return_tensors!r}")
        return {"pixel_values": self.adapter.preprocess(as_frames(images), size=self.size)}


class AdaptedModel(nn.Module):
    """Encodes ``pixel_values``; ``last_hidden_state`` is ``(B, h * w, C)``."""

    def __init__(self, adapter: CoSettleAdapter) -> None:
        super().__init__()
        self.adapter = adapter

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> AdaptedModel:
        return cls(CoSettleAdapter.from_pretrained(name, **options))

    def forward(self, pixel_values: Tensor, output_hidden_states: bool = False) -> AdaptedOutput:
        adapter, config = self.adapter, self.adapter.config
        maps = adapter.backbone.intermediate_tokens(pixel_values, config.layers, norm=config.norm)
        features = adapter.projection(torch.cat(maps, dim=1))
        return AdaptedOutput(
            last_hidden_state=as_sequence(features),
            hidden_states=tuple(map(as_sequence, maps)) if output_hidden_states else None,
        )


def as_sequence(maps: Tensor) -> Tensor:
    return rearrange(maps, "b c h w -> b (h w) c")


def match_accuracy(tokens: Tensor, truth: Tensor, visible: Tensor, columns: int) -> float:
    """Return the percentage of nearest neighbours at most one patch from the true position."""
    first, last = F.normalize(tokens[0], dim=-1), F.normalize(tokens[-1], dim=-1)
    nearest = (first @ last.T).argmax(dim=1).cpu()
    matches = torch.stack((nearest // columns, nearest % columns), dim=-1)
    return 100 * float(((matches - truth).abs().amax(-1) <= 1)[visible].float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="dinov2-vits14-pypi", help="name, repository or folder")
    parser.add_argument("--size", type=int, nargs=2, default=(224, 308), metavar=("H", "W"))
    options = parser.parse_args()

    model = AdaptedModel.from_pretrained(options.model)
    processor = AdaptedImageProcessor(model.adapter, size=tuple(options.size))
    clip = render_clip(photographs()["coffee"], frames=12, size=tuple(options.size), seed=7)

    inputs = processor(images=list(clip.frames[[0, -1]]), return_tensors="pt")
    with torch.inference_mode():
        outputs = model(**inputs, output_hidden_states=True)
    print("pixel_values     ", tuple(inputs["pixel_values"].shape))
    print("last_hidden_state", tuple(outputs.last_hidden_state.shape))

    geometry = model.adapter.geometry(*options.size)
    centres = rearrange(geometry.cell_centers(), "h w xy -> (h w) xy")
    positions, visible = clip.track(centres)
    truth = geometry.pixels_to_cells(positions[-1])
    print("matches 11 frames later at most one patch off: raw, then adapted")
    for tokens in (outputs.hidden_states[0], outputs.last_hidden_state):
        print(f"  {match_accuracy(tokens, truth, visible[-1], geometry.grid[1]):.1f} %")


if __name__ == "__main__":
    main()
