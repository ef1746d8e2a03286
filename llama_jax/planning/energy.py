"""Energy and carbon of a run, by the paper's formula (section 2.2.1, Table 2).

The paper gives chip-hours, watts and tonnes; the overhead of the building and the
intensity of the grid that its figures contain are those of Llama 1 (arXiv 2302.13971,
Table 15): 1.1 and 0.385 kg CO2eq per kWh.
"""

import dataclasses

from llama_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Power:
    """What a chip draws, and where the power comes from.

    Attributes:
      watts_per_chip: thermal design power, as if drawn all the time.
      overhead: power of the building over that of its chips (PUE).
      kg_co2_per_kwh: of the grid, in CO2 equivalents.

    Raises:
      ConfigError: no watts, an overhead below 1, or a negative intensity.
    """

    watts_per_chip: float
    overhead: float = 1.1
    kg_co2_per_kwh: float = 0.385

    def __post_init__(self) -> None:
        if not self.watts_per_chip > 0:
            raise ConfigError(
                f"watts_per_chip is {self.watts_per_chip}: it must be positive."
            )
        if not self.overhead >= 1:
            raise ConfigError(
                f"overhead (PUE) is {self.overhead}: it counts the chips themselves, "
                "so it is at least 1."
            )
        if not self.kg_co2_per_kwh >= 0:
            raise ConfigError(
                f"kg_co2_per_kwh is {self.kg_co2_per_kwh}: it must be 0 or more."
            )

    def energy_kwh(self, chip_hours: float) -> float:
        """What the building takes from the grid."""
        return chip_hours * self.watts_per_chip / 1000 * self.overhead

    def co2_tonnes(self, chip_hours: float) -> float:
        """CO2 equivalents of that."""
        return self.energy_kwh(chip_hours) * self.kg_co2_per_kwh / 1000
