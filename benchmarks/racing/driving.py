"""Running a race's pieces in order, by one process or by several at once."""

import fcntl
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from backfold.training.run_folder import write_json
from racing.contenders import CONTENDERS, Contender
from racing.pieces import Choice, Judgement, Piece, Run, Timing, trials_of
from racing.pretraining import OutOfTimeError
from racing.race import Race

WAIT_SECONDS = 1.0


def pieces_of(
    chosen: Sequence[Contender], seeds: Sequence[int], learning_rates: tuple[float, ...]
) -> list[Piece]:
    """All pieces of these contenders, each once, in an order in which they can run.

    Seed by seed: whenever time is up, as many contenders as possible can be compared.
    """
    found: dict[str, Piece] = {}
    for backbone in dict.fromkeys(contender.backbone for contender in chosen):
        _add(found, [Timing(backbone, _timed(backbone))])
    tuned = {contender.tuned for contender in chosen}
    for seed in seeds:
        for contender in chosen:
            _add(found, trials_of(contender, learning_rates))
            if contender.is_trained:
                _add(found, [Run(contender, seed, learning_rates)])
            if contender.name in tuned:
                _add(found, [Choice(contender, seeds[0], learning_rates)])
            _add(found, [Judgement(contender, seed, learning_rates)])
    return list(found.values())


def with_tuned(names: Iterable[str]) -> list[Contender]:
    """The contenders of these names, and those that were tuned for them."""
    wanted = set(names)
    wanted |= {contender.tuned for contender in CONTENDERS if contender.name in wanted}
    return [contender for contender in CONTENDERS if contender.name in wanted]


def _add(found: dict[str, Piece], pieces: Iterable[Piece]) -> None:
    for piece in pieces:
        found.setdefault(piece.name, piece)


def _timed(backbone: str) -> tuple[Contender, ...]:
    return tuple(
        contender
        for contender in CONTENDERS
        if contender.backbone == backbone and contender.is_trained and not contender.tuned_as
    )


def drive(race: Race, pieces: Sequence[Piece]) -> list[str]:
    """Run what is not done yet; returns the names of the pieces that are left over.

    Several processes may drive the same race: each takes pieces that no other is at.

    Raises:
        UserError: what a piece raises, or the folder holds another race.
    """
    race.describe()
    while True:
        left = [piece for piece in pieces if not (race.out / piece.name).exists()]
        if not left or time.monotonic() > race.deadline:
            return [piece.name for piece in left]
        if not any(_attempt(race, piece) for piece in left):
            time.sleep(WAIT_SECONDS)


def _attempt(race: Race, piece: Piece) -> bool:
    """Whether the piece was run, if only in part."""
    if not all((race.out / name).exists() for name in piece.needs):
        return False
    with _locked(race.work / "locks" / f"{piece.name.replace('/', '-')}.lock") as is_ours:
        if not is_ours or (race.out / piece.name).exists():
            return False
        started = time.monotonic()
        try:
            content = piece.run(race)
        except OutOfTimeError:
            return True
        seconds = time.monotonic() - started
        write_json(
            race.out / piece.name, {**content, "piece_seconds": seconds, "facts": race.facts()}
        )
        print(f"{piece.name}: {seconds:.0f} s", flush=True)
        return True


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Whether no other process has this lock; it is dropped when the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True
