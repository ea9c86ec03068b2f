from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, build_model_from_openai_state_dict

from cosettle_adapter.backbones import lookup
from cosettle_adapter.backbones.checkpoints import read_checkpoint
from cosettle_adapter.backbones.layouts import to_timm
from cosettle_adapter.errors import CorruptWeightsError

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")


@pytest.fixture(scope="module")
def openai(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small archive of the structure that OpenAI released: traced, in half precision."""
    vision = CLIPVisionCfg(layers=2, width=64, head_width=64, patch_size=16, image_size=32)
    text = CLIPTextCfg(context_length=8, vocab_size=20, width=64, heads=1, layers=2)
    model = CLIP(32, vision, text, quick_gelu=True).eval()
    inputs = (torch.zeros(1, 3, 32, 32), torch.zeros(1, 8, dtype=torch.long))
    path = tmp_path_factory.mktemp("openai") / "ViT-B-16.pt"
    torch.jit.trace(model, inputs).half().save(str(path))
    return path


def test_every_tensor_is_that_of_the_archive(openai: Path) -> None:
    found = read_checkpoint(openai).tensors
    expected = torch.jit.load(str(openai), map_location="cpu").state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype == torch.float16
        assert torch.equal(found[name], tensor)


def test_open_clip_builds_its_model_of_what_is_read(openai: Path) -> None:
    found = read_checkpoint(openai).tensors
    archive = torch.jit.load(str(openai), map_location="cpu").state_dict()
    images = torch.randn(2, 3, 32, 32)
    for state in (found, archive):
        del state["attn_mask"]  # a buffer that open_clip itself does not store
    encoded = [
        build_model_from_openai_state_dict(dict(state), cast_dtype=torch.float32)
        .float()
        .eval()
        .encode_image(images)
        for state in (found, archive)
    ]
    assert torch.equal(*encoded)
    renamed = to_timm(found, lookup("clip-vitb16"))
    assert renamed["blocks.1.attn.qkv.weight"].shape == (192, 64)
    assert not [name for name in renamed if "text" in name or "transformer" in name]


def test_lists_buffers_and_other_types_are_read(tmp_path: Path) -> None:
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.BatchNorm2d(4)).double()
    torch.jit.script(layers).save(str(tmp_path / "script.pt"))
    found = read_checkpoint(tmp_path / "script.pt").tensors
    assert found.keys() == layers.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in layers.state_dict().items())


# Archives that somebody made to do harm

Members = dict[str, bytes]
EIGHT = b"\0" * 8  # a storage of two floats
FLOAT = b"ctorch\nFloatStorage\n"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
NEW = b"c__torch__.a\nB\n)\x81"  # an object of a class of the archive


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def storage(key: str = "0", count: int = 2) -> bytes:
    return b"(" + text("storage") + FLOAT + text(key) + text("cpu") + f"I{count}\n".encode() + b"tQ"


def tensor(
    stored: bytes, *, size: int = 2, stride: int = 1, offset: int = 0, rebuild: bytes = TENSOR
) -> bytes:
    numbers = f"I{offset}\n".encode(), f"I{size}\n".encode(), f"I{stride}\n".encode()
    return rebuild + b"(" + stored + numbers[0] + numbers[1] + b"\x85" + numbers[2] + b"\x85\x89}tR"


def module(value: bytes) -> bytes:
    """A pickle of a module with one attribute, ``weight``."""
    return b"\x80\x02" + NEW + b"}" + text("weight") + value + b"sb."


def written(path: Path, pickled: bytes, compression: int = 0, **members: bytes) -> Path:
    content = {"data.pkl": pickled, "constants.pkl": b"\x80\x02).", "data/0": EIGHT, **members}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(f"model/{name}", data)
    return path


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def test_the_pickles_below_are_read_if_they_are_harmless(tmp_path: Path) -> None:
    found = read_checkpoint(written(tmp_path / "good.pt", module(tensor(storage())))).tensors
    assert {name: value.tolist() for name, value in found.items()} == {"weight": [0.0, 0.0]}
    circle = b"\x80\x02" + NEW + b"q\0}" + text("self") + b"h\0s" + text("a")
    circle += tensor(storage()) + b"sb."
    assert read_checkpoint(written(tmp_path / "circle.pt", circle)).tensors.keys() == {"a"}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", ["os.system", "eval", "getattr", "torch.load", "reset a class"])
def test_nothing_that_a_pickle_names_is_called(name: str, protocol: int, tmp_path: Path) -> None:
    target = tmp_path / "payload"
    call, shown = {
        "os.system": (Call(os.system, f"touch {target}"), r"(posix|nt)\.system"),
        "eval": (Call(eval, f"open({str(target)!r}, 'w')"), r"\w*builtin\w*\.eval"),
        "getattr": (Call(getattr, "a", "upper"), r"\w*builtin\w*\.getattr"),
        "torch.load": (Call(torch.load, str(target)), r"torch\.serialization\.load"),
        "reset a class": (Call(setattr, str, "upper", 1), r"\w*builtin\w*\.setattr"),
    }[name]
    path = written(tmp_path / "evil.pt", pickle.dumps(call, protocol=protocol))
    with pytest.raises(
        CorruptWeightsError, match=rf"evil\.pt.*more than tensors \({shown}\); it was not executed"
    ):
        read_checkpoint(path)
    assert not target.exists()


BAD: dict[str, tuple[bytes, str]] = {
    "dotted name": (b"\x80\x04\x8c\x05torch\x8c\x0b_utils.warn\x93.", "more than tensors"),
    "other torch function": (
        module(tensor(storage(), rebuild=b"ctorch._utils\n_rebuild_parameter\n")),
        r"more than tensors \(torch\._utils\._rebuild_parameter\)",
    ),
    "own class with arguments": (b"\x80\x02c__torch__.a\nB\n" + text("x") + b"\x85R.", "argument"),
    "own object called": (b"\x80\x02" + NEW + text("x") + b"\x85R.", "callable"),
    "outside the archive": (module(tensor(storage("../../../etc/passwd"))), "no item named"),
    "large storage": (module(tensor(storage(count=10**12))), "has 8 bytes, expected"),
    "small storage": (module(tensor(storage(count=1))), "has 8 bytes, expected"),
    "large tensor": (module(tensor(storage(), size=10**12, stride=0)), "exceeds its storage"),
    "past the end": (module(tensor(storage(), offset=1)), "out of bounds"),
    "negative stride": (module(tensor(storage(), stride=-1)), "Negative"),
    "tensor of a module": (module(tensor(NEW)), "numel"),
    "no tensors": (b"\x80\x02" + NEW + b"}b.", "holds no tensors"),
    "no module": (b"\x80\x02].", "holds no tensors"),
    "cut off": (module(tensor(storage()))[:-4], "truncated"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_hostile_or_damaged_pickle_is_refused(case: str, tmp_path: Path) -> None:
    pickled, message = BAD[case]
    with pytest.raises(CorruptWeightsError, match=rf"bad\.pt.*{message}") as caught:
        read_checkpoint(written(tmp_path / "bad.pt", pickled))
    assert "\n" not in str(caught.value)


def test_archives_that_grow_when_read_are_refused(tmp_path: Path) -> None:
    pickled = module(tensor(storage()))
    bomb = written(tmp_path / "bomb.pt", pickled, zipfile.ZIP_DEFLATED, **{"data/1": b"\0" * 10**6})
    overlapping = written(tmp_path / "overlapping.pt", pickled, **{"data/1": b"\0" * 4096})
    with zipfile.ZipFile(overlapping, "a") as archive:
        for _ in range(9):
            archive.filelist.append(archive.getinfo("model/data/1"))
        archive._didModify = True  # type: ignore[attr-defined]
    twice = written(tmp_path / "twice.pt", pickled, **{"data/x/data.pkl": pickled})
    half = tmp_path / "half.pt"
    half.write_bytes(bomb.read_bytes()[:300])
    for path, message in (
        (bomb, "compressed or overlap"), (overlapping, "compressed or overlap"),
        (twice, "too many values"), (half, "truncated or not"),
    ):  # fmt: skip
        with pytest.raises(CorruptWeightsError, match=rf"{path.name}.*{message}"):
            read_checkpoint(path)
