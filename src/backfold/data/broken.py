"""Counting files that can't be read."""

from collections.abc import Sequence

from backfold.data.source import ImageSource
from backfold.errors import UserError


class BrokenFiles:
    """Counts distinct broken files, and stops the run when there are too many.

    Args:
        allowed: how many are put up with.
    """

    def __init__(self, allowed: int) -> None:
        self.allowed = allowed
        self._seen: dict[str, None] = {}

    @classmethod
    def for_source(cls, source: ImageSource, max_broken_share: float = 0.01) -> "BrokenFiles":
        """Allow this share of the source's images, and always one."""
        return cls(max(1, int(max_broken_share * len(source))))

    @property
    def descriptions(self) -> list[str]:
        """The distinct files, in the order met."""
        return list(self._seen)

    def add(self, descriptions: Sequence[str]) -> list[str]:
        """Count a batch's broken files; returns those met for the first time.

        Raises:
            UserError: more distinct files than allowed.
        """
        new = [line for line in dict.fromkeys(descriptions) if line not in self._seen]
        self._seen.update(dict.fromkeys(new))
        if len(self._seen) > self.allowed:
            raise UserError(
                f"{len(self._seen)} images can't be read, {self.allowed} are allowed: "
                f"{'; '.join(self.descriptions[:3])}; mend or remove them"
            )
        return new
