"""What a reader of the page asks for, checked."""

from __future__ import annotations

from http import HTTPStatus
from urllib.parse import parse_qs

from cosettle_adapter.visualization.viewed_clip import ViewedClip


class RequestError(Exception):
    """What was asked for cannot be had; the message is a sentence for a person."""

    def __init__(self, status: HTTPStatus, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class Query:
    """The part of an address after the question mark; refuses what makes no sense."""

    def __init__(self, text: str) -> None:
        self._values = {name: values[-1] for name, values in parse_qs(text).items()}

    def text(self, name: str) -> str:
        """The value as it stands."""
        try:
            return self._values[name]
        except KeyError:
            raise RequestError(
                HTTPStatus.BAD_REQUEST, f"The address lacks {name}=, which is needed here."
            ) from None

    def number(self, name: str) -> float:
        """The value as a number."""
        try:
            return float(self.text(name))
        except ValueError:
            raise RequestError(
                HTTPStatus.BAD_REQUEST, f"Got {name}={self.text(name)!r}, expected a number."
            ) from None

    def frame(self, name: str, clip: ViewedClip) -> int:
        """The value as the index of one of the clip's frames."""
        last = len(clip.pictures) - 1
        text = self.text(name)
        if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) <= last):
            raise RequestError(
                HTTPStatus.BAD_REQUEST, f"Got {name}={text!r}, expected a frame from 0 to {last}."
            )
        return int(text)

    def kind(self, clip: ViewedClip) -> str:
        """``kind=``, one of the clip's kinds of features."""
        kind = self.text("kind")
        if kind not in clip.features:
            raise RequestError(
                HTTPStatus.BAD_REQUEST,
                f"Got kind={kind!r}, expected one of {', '.join(map(repr, clip.features))}.",
            )
        return kind
