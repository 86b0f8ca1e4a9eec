"""How the report writes numbers and differences; a missing one is said to be missing."""

import math

ABSENT = "not measured"
NOT_FINITE = "not finite"


def is_finite(value: float | None) -> bool:
    """Whether there is a value, and it is neither NaN nor infinite."""
    return value is not None and math.isfinite(value)


def decimals(value: float | None, digits: int, unit: str = "") -> str:
    """The value with so many decimals and its unit, never "-0.0"."""
    if value is None:
        return ABSENT
    if not math.isfinite(value):
        return NOT_FINITE
    return f"{_without_negative_zero(value, digits):,.{digits}f}{unit and ' ' + unit}"


def signed(value: float | None, digits: int, unit: str = "") -> str:
    """As `decimals`, with a plus sign where it applies."""
    if value is None or not math.isfinite(value):
        return decimals(value, digits, unit)
    rounded = _without_negative_zero(value, digits)
    sign = "+" if rounded > 0 else ""
    return f"{sign}{decimals(value, digits, unit)}"


def _without_negative_zero(value: float, digits: int) -> float:
    return round(value, digits) + 0.0


def significant(value: float | None, digits: int = 3) -> str:
    """The value with so many significant digits."""
    if value is None:
        return ABSENT
    return f"{value:.{digits}g}" if math.isfinite(value) else NOT_FINITE


def whole(value: float | None) -> str:
    """A count, with commas between thousands."""
    return decimals(value, 0)


def percent(share: float | None, digits: int = 1) -> str:
    """A share from 0 to 1 in percent."""
    return decimals(None if share is None else 100 * share, digits, "%")


def duration(seconds: float | None) -> str:
    """A duration in its two largest units."""
    if seconds is None or not math.isfinite(seconds):
        return decimals(seconds, 1)
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} d {hours} h"


def counted(count: int, singular: str, plural: str) -> str:
    """The count with the noun in its number."""
    return f"{count} {singular if count == 1 else plural}"


PROTOCOL_NAMES = {
    "knn": "kNN",
    "linear": "Linear probe",
    "attentive": "Attentive probe",
    "finetune": "Fine-tuning",
}


def protocol_name(protocol: str) -> str:
    """A protocol's name as a sentence's beginning."""
    return PROTOCOL_NAMES.get(protocol, protocol)


def origin_phrase(data: str | None, step: float | None) -> str:
    """Which data, and which step of the run, something was measured on; nothing if unknown."""
    parts = (data, None if step is None else f"step {whole(step)}")
    return ", ".join(part for part in parts if part)


def labels_phrase(labels: int | str) -> str:
    """How many labels a probe had."""
    if labels == "all":
        return "all labels"
    if isinstance(labels, str):
        return f"{labels} of the labels"
    return f"{labels} label a class" if labels == 1 else f"{labels} labels a class"
