"""Stop strings: a text that comes in pieces is cut where one of them begins."""

from collections.abc import Sequence


class StopStrings:
    """Passes a text on, piece by piece, up to the first stop string in it.

    What may be the beginning of one is held back until more shows whether it is.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """The text that no stop string can touch any more; "" once one was found."""
        if self.found:
            return ""
        text = self._held + text
        # The one that is whole first, which no border between pieces changes.
        found = [
            (place + len(stop), place)
            for stop in self._stops
            if (place := text.find(stop)) >= 0
        ]
        if found:
            self.found, self._held = True, ""
            return text[: min(found)[1]]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What is held still, to be called when no more comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The longest end of `text` that `stop` begins with, in characters."""
    longest = min(len(text), len(stop) - 1)
    return next(
        (size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0
    )
