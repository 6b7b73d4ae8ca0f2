import pytest

from pipeline.report import numbers as figures
from pipeline.report.vega import escape_script


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (-3, "−3"),
        (12.3456, "12.35"),
        (-0.0123456, "−0.01235"),
        (1.3e-6, "1.3 × 10⁻⁶"),
        (-2.5e11, "−2.5 × 10¹¹"),
        (123456.7, "123,457"),
        (None, "–"),
        (float("nan"), "–"),
        ("text", "–"),
    ],
)
def test_numbers_have_four_digits_and_a_real_minus(value, text):
    assert figures.show_number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.847, "0.85 s"),
        (12.34, "12.3 s"),
        (59.99, "1 min 00 s"),
        (245, "4 min 05 s"),
        (7383, "2 h 03 min"),
        (None, "–"),
    ],
)
def test_seconds_read_as_a_clock_would_say_them(seconds, text):
    assert figures.show_seconds(seconds) == text


@pytest.mark.parametrize(
    ("mean", "deviation", "kind", "text"),
    [
        (0.8734, 0.0121, "share", "87.3 ± 1.2 %"),
        (12.3456, 0.432, "number", "12.3 ± 0.4"),
        (0.42044, 0.0063, "number", "0.420 ± 0.006"),
        (-25.8, 7.21, "number", "−25.8 ± 7.2"),
        (3.0, 0.0, "number", "3.00 ± 0.00"),
        (3.14159, None, "number", "3.142"),
        (None, None, "number", "–"),
    ],
)
def test_deviation_decides_the_digits_of_the_mean(mean, deviation, kind, text):
    assert figures.show_statistic({"mean": mean, "standard_deviation": deviation}, kind) == text


@pytest.mark.parametrize(
    ("figures_of_training", "text"),
    [
        ({"trained_parameters": 105_472, "parameters": 105_472}, "105,472 of 105,472 parameters (100 %)"),
        (
            {"trained_parameters": 1024, "parameters": 105_472, "adapted": {"q_proj": 2, "v_proj": 2}},
            "1,024 of 105,472 parameters (0.971 %): q_proj ×2, v_proj ×2",
        ),
        ({}, "–"),
    ],
)
def test_what_trained_is_a_share_of_the_model_by_layers(figures_of_training, text):
    assert figures.show_trained(figures_of_training) == text


def test_script_text_cannot_end_its_element():
    escaped = escape_script('x = "</script><!--<SCRIPT>"; y = a < b')
    assert escaped == r'x = "\x3C/script>\x3C!--\x3CSCRIPT>"; y = a < b'
