"""Numbers and settings as a reader of the page wants them."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

MOST_LISTED = 24


def metric(name: str, value: float) -> str:
    """A score: an accuracy in percent, anything else in four digits."""
    return f"{100 * value:.1f}%" if name == "accuracy" else number(value)


def change(name: str, before: float, after: float) -> str:
    """A difference of two scores with its sign: an accuracy's in points."""
    step = 100 * (after - before) if name == "accuracy" else after - before
    return signed(step, ".1f" if name == "accuracy" else ".2f" if 0.1 <= abs(step) < 1e4 else ".3g")


def better(name: str, before: float, after: float) -> bool:
    """Whether the second score is the better one: a higher accuracy, a lower perplexity or loss."""
    return after > before if name == "accuracy" else after < before


def number(value: float) -> str:
    """Four significant digits, or all digits of an integer's part."""
    if value != 0 and not 1e-4 <= abs(value) < 1e9:
        return f"{value:.3e}".replace("-", "−")
    return f"{value:,.{max(0, 3 - math.floor(math.log10(abs(value))))}f}".replace("-", "−") if value else "0"


def aligned(values: Sequence[float]) -> list[str]:
    """A column of losses, as many decimals each: so many that the least has two digits, but six at most."""
    sizes = [abs(value) for value in values if value] or [1.0]
    fewest = 4 if max(sizes) < 10 else 2 if max(sizes) < 1000 else 0
    places = min(max(1 - math.floor(math.log10(min(sizes))), fewest), fewest + 2)
    return [
        f"{'<' if value > 0 else '>−'}{10.0**-places:.{places}f}"
        if value and abs(value) < 0.5 * 10.0**-places
        else f"{value:,.{places}f}".replace("-", "−")
        for value in values
    ]


def signed(value: float, form: str) -> str:
    """With its sign, a true minus, and none on zero."""
    return format(value, f"+{form}").replace("-", "−") if float(format(value, form)) else format(0.0, form.lstrip("+"))


def share(part: float, whole: float) -> str:
    """A part of a whole in percent."""
    return f"{100 * part / whole:.1f}%" if whole else "–"


def unit(values: Iterable[int]) -> tuple[float, str]:
    """What to count such numbers of parameters in, and its name ('' for one)."""
    most = max(values, default=0)
    for size, name in ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands")):
        if most >= size:
            return size, name
    return 1.0, ""


def counted(value: int, size: float) -> str:
    """So many units, two decimals, or two digits of a small part."""
    if size == 1:
        return str(value)
    part = value / size
    return f"{part:,.2f}" if part >= 0.1 or not part else f"{part:.{1 - math.floor(math.log10(part))}f}"


def whole(value: int) -> str:
    """With a narrow space between thousands."""
    return f"{value:,}".replace(",", "\u202f")


def short(value: int) -> str:
    """'22.57 M': millions, or billions; below a hundred thousand as it is."""
    if value < 1e5:
        return whole(value)
    return f"{value / 1e9:,.2f} B" if value >= 1e9 else f"{value / 1e6:,.2f} M"


def megabytes(value: int) -> str:
    """Bytes in MB of a million: one decimal, or more where that would say nothing."""
    size = value / 1e6
    return f"{size:,.1f}" if size >= 1 or not value else f"{size:.{max(3, 1 - math.floor(math.log10(size)))}f}"


def ms(value: float) -> str:
    """Milliseconds, three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def seconds(value: float) -> str:
    """'0.4 s', '75 s', '12 min', '3.1 h'."""
    for size, name in ((3600.0, "h"), (60.0, "min")):
        if value >= 2 * size:
            return f"{value / size:.3g} {name}"
    return f"{value:.3g} s" if value >= 0.1 else f"{value:.2f} s"


def flat(values: dict[str, Any], above: str = "") -> list[tuple[str, str]]:
    """Settings as pairs of words: nested names joined by dots."""
    pairs: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{above}{key}"
        pairs += flat(value, f"{name}.") if isinstance(value, dict) and value else [(name, said(value))]
    return pairs


def said(value: Any) -> str:
    """A setting's value; of a long list the beginning, and how many more."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        more = f" … and {len(value) - MOST_LISTED} more" if len(value) > MOST_LISTED else ""
        return ", ".join(said(each) for each in value[:MOST_LISTED]) + more or "–"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "–" if value is None or value == {} else str(value)
