"""The colours of curves and text can be told from the paper: WCAG contrast, in both themes."""

import re

import pytest

from rwkv_accel.report.page import STATIC

CSS = (STATIC / "style.css").read_text(encoding="utf-8")
HEX = r"#[0-9a-fA-F]{3,6}"


def theme(selector):
    body = CSS.split(selector + " {")[1].split("}")[0]
    return {name: value for name, value in re.findall(rf"--([\w-]+): ({HEX})", body)}


LIGHT, DARK = theme(":root"), theme(':root[data-theme="dark"]')


def luminance(colour):
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_that_of_wcag():
    assert contrast("#000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#fff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_curves_and_text_stand_out(colours):
    for number in range(8):
        assert contrast(colours[f"run-{number}"], colours["card"]) >= 4.5, number
    for name in ("ink", "soft", "accent", "good", "warn", "bad"):
        assert contrast(colours[name], colours["card"]) >= 4.5, name
        assert contrast(colours[name], colours["paper"]) >= 4.5, name


def test_both_ways_into_the_dark_are_the_same():
    assert theme(':root:not([data-theme="light"])') == DARK
    assert set(DARK) <= set(LIGHT)
