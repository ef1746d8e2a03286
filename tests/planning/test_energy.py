"""Energy and carbon: Meta's own table comes out of the same formula."""

import pytest

from llama_jax.errors import ConfigError
from llama_jax.planning.energy import Power

# Paper, Table 2: GPU hours, watts, tonnes of CO2 equivalents as printed.
TABLE = {
    "7B": (184_320, 400, 31.22),
    "13B": (368_640, 400, 62.44),
    "34B": (1_038_336, 350, 153.90),
    "70B": (1_720_320, 400, 291.42),
}


def test_the_papers_table():
    """The printed rows are cut off after two digits; the total was rounded."""
    total_hours = total_tonnes = 0.0
    for hours, watts, printed in TABLE.values():
        tonnes = Power(watts_per_chip=watts).co2_tonnes(hours)
        assert 0 <= tonnes - printed < 0.01
        total_hours += hours
        total_tonnes += tonnes
    assert total_hours == 3_311_616
    assert total_tonnes == pytest.approx(539.00, abs=0.005)


def test_energy_counts_the_building():
    power = Power(watts_per_chip=500, overhead=1.2, kg_co2_per_kwh=0.1)
    assert power.energy_kwh(1000) == pytest.approx(600)
    assert power.co2_tonnes(1000) == pytest.approx(0.06)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"watts_per_chip": 0.0}, "watts_per_chip is 0"),
        ({"watts_per_chip": 1.0, "overhead": 0.9}, r"overhead \(PUE\) is 0.9"),
        ({"watts_per_chip": 1.0, "kg_co2_per_kwh": -1.0}, "kg_co2_per_kwh is -1"),
    ],
)
def test_impossible_power(values, reason):
    with pytest.raises(ConfigError, match=reason):
        Power(**values)
