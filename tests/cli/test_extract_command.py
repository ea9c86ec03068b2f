from __future__ import annotations

import functools
import json
import os
import re
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from training_fakes import small_backbone

from cosettle_adapter import CoSettleAdapter
from cosettle_adapter.cli import main
from cosettle_adapter.cli.common import ModelOptions
from cosettle_adapter.extraction import Job, RayOptions, extract_many, read_features

from helpers import projection_for, write_video


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """A small adapter in place of the real one, and how it was asked for."""
    calls: list[dict[str, object]] = []
    backbone = small_backbone()

    def load(model: ModelOptions, **asked: object) -> CoSettleAdapter:
        calls.append({"device": model.device, **asked})
        if asked.get("raw") or asked.get("layer") is not None:
            return CoSettleAdapter.raw(backbone, layer=asked.get("layer"))  # type: ignore[arg-type]
        return CoSettleAdapter(backbone, projection_for(backbone, layers=(1,)))

    monkeypatch.setattr(ModelOptions, "load", load)
    monkeypatch.setenv("COLUMNS", "300")
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    return calls


@pytest.fixture
def videos(tmp_path: Path, loaded: list[dict[str, object]]) -> Path:
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in "abc":
        write_video(folder / f"{name}.mp4", frames=6, height=48, width=64)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_of_videos_becomes_a_folder_of_files(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (videos / "bad.mp4").write_bytes(b"no video")
    command = ["extract", str(videos), "-o", str(tmp_path / "out"), "--format", "npy-memmap"]
    assert main(command) == 1
    said = capsys.readouterr().out
    assert "4 sources, 4 to do" in said
    assert "3 written, 1 failed" in said
    assert f"failed: {videos / 'bad.mp4'} cannot be read as a video" in said
    assert names(tmp_path / "out") == [f"{n}.npy{s}" for n in "abc" for s in ("", ".json")]
    (videos / "bad.mp4").unlink()
    assert main([*command[:3], str(tmp_path / "large"), "--size", "999999"]) == 1
    assert "memory does not suffice; give a smaller size" in capsys.readouterr().out
    assert main(command) == 0
    assert "3 existing" in capsys.readouterr().out
    assert main([*command, "--overwrite"]) == 0
    assert "3 written" in capsys.readouterr().out


def test_finished_files_of_other_settings_are_refused(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["extract", str(videos / "a.mp4"), "-o", str(tmp_path / "a.safetensors")]
    assert main(command) == 0
    assert main(command) == 0
    assert "exists already: features (6, 32, 3, 4)" in capsys.readouterr().out
    assert main([*command, "--every", "2"]) == 1
    assert "every was 1 and is 2; start over with --overwrite" in capsys.readouterr().out
    assert main([*command, "--every", "2", "--overwrite"]) == 0
    assert len(read_features(tmp_path / "a.safetensors").features) == 3


def test_options_reach_the_extraction(videos: Path, tmp_path: Path) -> None:
    command = ["extract", str(videos / "a.mp4"), "-o", str(tmp_path / "a.npy")]
    command += ["--temporal-fusion", "causal", "--settle", "--size", "32x48", "--fit", "pad"]
    command += ["--storage", "float16", "--batch-size", "3", "--start", "0.04", "--max-frames", "4"]
    assert main(command) == 0
    said = json.loads((tmp_path / "a.npy.json").read_text())
    assert said["settings"] == {
        "size": [32, 48], "fit": "pad", "start": 0.04, "end": None, "every": 1, "max_frames": 4,
        "fps": None, "times": None, "source_fps": None, "stream_index": None,
        "square_pixels": False, "deinterlace": False, "tone_map": False, "live": None,
        "decode_on": None, "on_damage": "warn", "settle": True, "temporal_fusion": "causal",
        "tokens": ["patch"],
    }  # fmt: skip
    assert (said["storage"], said["batch_size"], said["shape"]) == ("float16", 3, [4, 32, 2, 3])


def test_help_describes_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["extract", "--help"]) == 0
    shown = capsys.readouterr().out
    options = re.findall(r"^│ [ *] +(--\S+.*)", shown, re.MULTILINE)
    assert len(options) > 15
    for option in options:
        assert re.search(r"\S  +[a-z]", option), f"no description: {option}"


def test_vectors_of_frames_are_written_and_told(
    videos: Path, tmp_path: Path, loaded: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pyarrow")
    command = ["extract", str(videos / "a.mp4"), "-o", str(tmp_path / "a.safetensors")]
    assert main([*command, "--tokens", "cls,patch"]) == 0
    assert "a.safetensors: features (6, 32, 3, 4), cls (6, 32), timest" in capsys.readouterr().out
    command[1:] = [str(videos), "-o", str(tmp_path / "out"), "--format", "parquet"]
    assert main([*command, "--tokens", "cls"]) == 0
    assert names(tmp_path / "out")[::2] == [f"{name}.parquet" for name in "abc"]
    loaded.clear()
    assert main(command) == 1
    assert "parquet holds one of cls, mean, not patch: give --tokens cls" in capsys.readouterr().err
    assert not loaded, "told before the model is loaded"


def test_ray_spreads_the_videos(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaded: list[dict[str, object]]
) -> None:
    spread: list[RayOptions] = []

    def here(make: Any, jobs: list[Job], *, how: RayOptions, **options: Any) -> Any:
        spread.append(how)
        return extract_many(make(), jobs, **options)

    monkeypatch.setattr("cosettle_adapter.cli.extract.extract_with_ray", here)
    monkeypatch.setattr("cosettle_adapter.cli.extract.require_ray", lambda: None)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    command = ["extract", str(videos), "-o", str(tmp_path / "out"), "--engine", "ray"]
    assert main([*command, "--workers", "2", "--retries", "0", "--device", "cuda"]) == 0
    assert spread == [RayOptions(workers=2, gpus_per_worker=1, retries=0)]
    assert [call["device"] for call in loaded] == ["cpu", "cuda"]
    assert names(tmp_path / "out")[::2] == [f"{name}.safetensors" for name in "abc"]


def test_shards_share_the_videos(
    videos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["extract", str(videos), "-o", str(tmp_path / "out")]
    assert main([*command, "--shard", "0/2"]) == 0
    assert "3 sources, 2 to do of shard 0/2 (--shard)" in capsys.readouterr().out
    assert names(tmp_path / "out")[::2] == ["a.safetensors", "c.safetensors"]
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert main(command) == 0
    assert "1 to do of shard 1/2 (SLURM_PROCID)" in capsys.readouterr().out
    assert names(tmp_path / "out")[::2] == [f"{name}.safetensors" for name in "abc"]
    assert main([*command, "--shard", "3/2"]) == 1


def test_a_bad_video_does_not_have_torchrun_end_the_other_shards(
    videos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (videos / "a.mp4").write_bytes(b"no video")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["extract", str(videos), "-o", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "1 written, 1 failed" in said
    assert "torchrun would end the other shards" in said
    output = str(tmp_path / "out")
    command = ["extract", str(videos), "-o", output, "--storage", "bfloat16", "--format", "zarr"]
    assert main(command) == 1, "a mistake in the command is everybody's"


def test_raw_is_what_the_projection_reads_and_layer_a_block(
    videos: Path, tmp_path: Path, loaded: list[dict[str, object]]
) -> None:
    source = str(videos / "a.mp4")
    files = [tmp_path / f"{index}.safetensors" for index in range(4)]
    assert main(["extract", source, "-o", str(files[0]), "--raw"]) == 0
    adapter = ModelOptions().load()
    (chunk,) = adapter.stream(source, return_backbone=True)
    assert chunk.backbone is not None
    assert torch.equal(read_features(files[0]).features, chunk.backbone)
    assert main(["extract", source, "-o", str(files[1]), "--layer", "0"]) == 0
    assert read_features(files[1]).metadata["layers"] == [0]
    unpublished = ["extract", source, "--model", "dinov2-vitb14", "-o"]
    assert main([*unpublished, str(files[2]), "--raw"]) == 0
    assert loaded[-1]["raw"], "nothing is fitted to be left out"
    assert main(["extract", source, "-o", str(files[0]), "--raw", "--layer", "0"]) == 2
    assert main(["extract", source, "-o", str(files[0]), "--format", "npz"]) == 2


def test_where_outputs_go(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(videos / "a.mp4")
    assert main(["extract", source, "-o", str(tmp_path / "new")]) == 0
    assert names(tmp_path / "new") == ["a.safetensors", "a.safetensors.json"]
    assert main(["extract", str(videos), "-o", str(tmp_path / "x.npy")]) == 1
    assert "3 sources need a folder to write to" in capsys.readouterr().err
    assert main(["extract", source, "-o", str(tmp_path / "x.npy"), "--format", "zarr"]) == 1
    assert "zarr for x.npy, whose suffix is that of npy-memmap" in capsys.readouterr().err
    for form in ([], ["--format", "zarr"]):
        assert main(["extract", source, "-o", str(tmp_path / "x.h5"), *form]) == 1
        assert "the suffix of x.h5 is not that of a format: use one" in capsys.readouterr().err
    for final in ("/", ""):  # then it exists
        assert main(["extract", source, "-o", f"{tmp_path}/x.h5{final}"]) == 0


def test_empty_standard_input_is_named(
    tmp_path: Path, loaded: list[dict[str, object]], capsys: pytest.CaptureFixture[str]
) -> None:
    stdin = os.dup(0)
    with Path(os.devnull).open() as empty:
        os.dup2(empty.fileno(), 0)
    try:
        assert main(["extract", "-", "-o", str(tmp_path / "a.npy")]) == 1
    finally:
        os.dup2(stdin, 0)
        os.close(stdin)
    assert "standard input cannot be read as a video" in capsys.readouterr().out


@pytest.mark.parametrize("output", ["out", "a.zarr"])
@pytest.mark.parametrize(("module", "extra"), [("zarr", "zarr"), ("av", "video")])
def test_a_missing_extra_is_reported_before_the_model_is_loaded(
    videos: Path,
    tmp_path: Path,
    loaded: list[dict[str, object]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    module: str,
    extra: str,
    output: str,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    if module == "av":
        monkeypatch.setitem(sys.modules, "zarr", ModuleType("zarr"))
    command = ["extract", str(videos / "a.mp4"), "-o", str(tmp_path / output), "--format", "zarr"]
    assert main(command) == 1
    assert f"cosettle-adapter[{extra}]" in capsys.readouterr().err
    assert not loaded
    assert names(tmp_path) == ["videos"]


@pytest.mark.parametrize("terminal", [False, True])
def test_the_speed_of_one_source_is_printed(
    videos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    terminal: bool,
) -> None:
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes stdout for a terminal
    command = ["extract", str(videos / "a.mp4"), "-o", str(tmp_path / "a.npy")]
    assert main(command) == 0
    assert re.search(r"a\.npy: features .*, timestamps, [0-9.]+ frames/s", capsys.readouterr().out)
    assert main(command) == 0
    assert "frames/s" not in capsys.readouterr().out.splitlines()[-1]


def test_ctrl_c_says_that_the_work_is_kept(
    videos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cosettle_adapter.extraction.record.RunRecord.append", interrupt)
    assert main(["extract", str(videos / "a.mp4"), "-o", str(tmp_path / "a.npy")]) == 130
    assert "the same command resumes from there" in capsys.readouterr().err


def test_a_video_at_a_url(
    videos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("no_proxy", "*")
    serve = functools.partial(SimpleHTTPRequestHandler, directory=str(videos))
    with ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/a.mp4?key=secret"
        assert main(["extract", url, url[:-6], "-o", str(tmp_path / "out")]) == 0
        for _ in range(2):
            assert main(["extract", url, "-o", str(tmp_path / "a.npy")]) == 0
        gone = url.replace("//", "//user:secret@").replace("a.mp4", "gone.mp4")
        assert main(["extract", gone, "-o", str(tmp_path / "gone.npy")]) == 1
        server.shutdown()
    printed = capsys.readouterr().out
    assert "exists already: features (6, 32, 3, 4)" in printed
    assert f"failed: http://127.0.0.1:{server.server_port}/gone.mp4 cannot be read" in printed
    assert "secret" not in printed
    assert len(names(tmp_path / "out")) == 4
    sidecar = json.loads((tmp_path / "a.npy.json").read_text())
    assert sidecar["source"] == "a.mp4"
    assert "secret" not in str(sidecar)
