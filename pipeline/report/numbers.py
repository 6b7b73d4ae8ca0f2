"""Figures as people read them: units, few digits, a real minus sign, and a dash for a value that is not there."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeGuard

import jinja2

DASH = "–"
MINUS = "−"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def show_count(value: Any) -> str:
    """12,345"""
    return f"{value:,.0f}".replace("-", MINUS) if _is_number(value) else DASH


def show_share(value: Any) -> str:
    """87.5 %"""
    return f"{100 * value:.1f} %" if _is_number(value) else DASH


def show_number(value: Any) -> str:
    """Four significant digits: 12.35, −0.004321, 1.3 × 10⁻⁶."""
    if not _is_number(value):
        return DASH
    size = abs(value)
    if value == 0 or (isinstance(value, int) and size < 10_000):
        return f"{value:.0f}".replace("-", MINUS)
    if size < 1e-3 or size >= 1e9:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.replace('-', MINUS)} × 10{str(int(exponent)).translate(_SUPERSCRIPT)}"
    decimals = max(0, 3 - _magnitude(size))
    return f"{value:,.{decimals}f}".replace("-", MINUS)


def show_seconds(value: Any) -> str:
    """0.85 s, 12.3 s, 4 min 05 s, 2 h 03 min"""
    if not _is_number(value):
        return DASH
    if value < 59.95:
        return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def show_statistic(statistic: Any, kind: str = "number") -> str:
    """The mean over seeds, with ± standard deviation where there are several; kind: number, share, count or seconds."""
    if not isinstance(statistic, Mapping):
        return DASH
    mean, deviation = statistic.get("mean"), statistic.get("standard_deviation")
    if not _is_number(mean) or not _is_number(deviation):
        return show_as(mean, kind)
    if kind == "share":
        return f"{100 * mean:.1f} ± {100 * deviation:.1f} %".replace("-", MINUS)
    if kind != "number" or not 1e-3 <= abs(mean) < 1e9:
        return f"{show_as(mean, kind)} ± {show_as(deviation, kind)}"
    # The deviation says how many digits of the mean mean anything; never more than three.
    decimals = 2 - _magnitude(mean)
    if deviation > 0:
        decimals = min(decimals, 1 - _magnitude(deviation))
    decimals = max(0, decimals)
    return f"{mean:,.{decimals}f} ± {deviation:,.{decimals}f}".replace("-", MINUS)


def show_measured(statistic: Any, kind: str = "number") -> str:
    """As show_statistic; a single seed is given ± its own standard error, where it has one."""
    if isinstance(statistic, Mapping) and statistic.get("standard_deviation") is None:
        statistic = {**statistic, "standard_deviation": statistic.get("standard_error")}
    return show_statistic(statistic, kind)


def show_interval(statistic: Any) -> str:
    """57.0–65.0 %, from shares"""
    low, high = (statistic.get(name) for name in ("low", "high")) if isinstance(statistic, Mapping) else (None, None)
    return f"{100 * low:.1f}–{100 * high:.1f} %" if _is_number(low) and _is_number(high) else DASH


def show_points(statistic: Any, base: Any) -> str:
    """+2.1 points: how far one mean share is above another."""
    mean, other = (found.get("mean") if isinstance(found, Mapping) else None for found in (statistic, base))
    if not _is_number(mean) or not _is_number(other):
        return DASH
    return f"{100 * (mean - other):+.1f} points".replace("-", MINUS)


def _magnitude(value: float) -> int:
    return math.floor(math.log10(abs(value)))


def show_as(value: Any, kind: str) -> str:
    """`value` in the format of that name."""
    return str(FILTERS[kind](value))


def total(values: Iterable[Any]) -> float | None:
    """Sum of the numbers among `values`; None if there is none."""
    numbers = [value for value in values if _is_number(value)]
    return sum(numbers) if numbers else None


def show_hyperparameters(values: Any) -> str:
    """beta 0.1, mixture 0.5; those that are None are left out."""
    if not isinstance(values, Mapping) or not values:
        return DASH
    return ", ".join(f"{name} {show_value(value)}" for name, value in values.items() if value is not None)


def show_null_weight(statistics: Mapping[str, Any]) -> str:
    """AuxDPO's weight in effect in both units, or that it is of a time when its one name meant the absolute one."""
    given, training = statistics.get("hyperparameters") or {}, statistics.get("training") or {}
    told = [(training.get(f"offsets/{name}") or {}).get("mean") for name in ("null_weight", "null_weight_absolute")]
    if all(_is_number(weight) for weight in told):
        return f" (null_weight {told[0]:.4g} is {told[1]:.4g} absolute)"
    if "null_weight" in given and "null_weight_absolute" not in given:
        return " (of an earlier version: null_weight is absolute)"
    return ""


def show_trained(figures: Any) -> str:
    """What trained of a model, by train.json's figures: 4,096 of 105,472 parameters (3.88 %): q_proj ×2, v_proj ×2"""
    if not isinstance(figures, Mapping) or not _is_number(figures.get("trained_parameters")):
        return DASH
    trained, parameters = figures["trained_parameters"], figures["parameters"]
    adapted = figures.get("adapted") or {}
    layers = f": {', '.join(f'{name} ×{count}' for name, count in adapted.items())}" if adapted else ""
    return f"{trained:,} of {parameters:,} parameters ({100 * trained / parameters:.3g} %){layers}"


def show_value(value: Any) -> str:
    """A parameter as a person would type it."""
    if value is None or isinstance(value, jinja2.Undefined):
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(show_value(item) for item in value)
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {show_value(inner)}" for name, inner in value.items())
    return str(value)


FILTERS: dict[str, Callable[..., Any]] = {
    "as": show_as,
    "total": total,
    "count": show_count,
    "share": show_share,
    "number": show_number,
    "seconds": show_seconds,
    "statistic": show_statistic,
    "measured": show_measured,
    "interval": show_interval,
    "points": show_points,
    "hyperparameters": show_hyperparameters,
    "null_weight": show_null_weight,
    "trained": show_trained,
    "value": show_value,
}
