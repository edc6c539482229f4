"""Reads the fields of one ``config.json``: typed, with transformers' class defaults, every error with its field."""

from __future__ import annotations

from collections.abc import Mapping

from vramplan.errors import ConfigError

_MISSING = object()


class Fields:
    """A ``config.json`` as data, for the family file ``vramplan/facts/families/<family>.py``.

    A field may have several spellings (transformers' ``attribute_map``); they must agree where more than one is given.
    A field that is absent takes the ``default`` of the transformers 5.17 config class; ``null`` counts as given.
    """

    def __init__(self, config: Mapping[str, object], family: str) -> None:
        self._config = config
        self.family = family

    def error(self, name: str, problem: str) -> ConfigError:
        """An error that names the field and the family file."""
        where = f"vramplan/facts/families/{self.family}.py"
        return ConfigError(f"config.json of a {self.family!r} model: field {name!r} {problem} (read by {where})")

    def _get(self, names: tuple[str, ...]) -> object:
        given = [name for name in names if name in self._config]
        for other in given[1:]:
            if self._config[other] != self._config[given[0]]:
                raise self.error(
                    given[0], f"is {self._config[given[0]]!r} but {other!r} is {self._config[other]!r}; they must agree"
                )
        return self._config[given[0]] if given else _MISSING

    def _positive(self, name: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(name, f"must be a positive whole number, not {value!r}")
        return value

    def required_size(self, *names: str) -> int:
        """A positive whole number that must be given."""
        value = self._get(names)
        if value is _MISSING:
            raise self.error(names[0], "is missing")
        return self._positive(names[0], value)

    def size(self, *names: str, default: int) -> int:
        """A positive whole number, else the class default."""
        value = self._get(names)
        return default if value is _MISSING else self._positive(names[0], value)

    def optional_size(self, *names: str, default: int | None) -> int | None:
        """A positive whole number or ``null``, else the class default."""
        value = self._get(names)
        if value is _MISSING:
            return default
        return None if value is None else self._positive(names[0], value)

    def count(self, *names: str, default: int) -> int:
        """A whole number that may be zero, else the class default."""
        value = self._get(names)
        if value is _MISSING:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.error(names[0], f"must be a whole number of at least 0, not {value!r}")
        return value

    def flag(self, *names: str, default: bool) -> bool:
        """true or false, else the class default."""
        value = self._get(names)
        if value is _MISSING:
            return default
        if not isinstance(value, bool):
            raise self.error(names[0], f"must be true or false, not {value!r}")
        return value

    def number(self, *names: str, default: float) -> float:
        """A number; absent or ``null``: the class default."""
        value = self._get(names)
        if value is _MISSING or value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(names[0], f"must be a number, not {value!r}")
        return float(value)

    def optional_number(self, *names: str, default: float | None) -> float | None:
        """A number or ``null``, else the class default."""
        value = self._get(names)
        if value is None:
            return None
        return default if value is _MISSING else self.number(*names, default=0.0)

    def fraction(self, *names: str, default: float) -> float:
        """A number from 0 to 1, such as a dropout probability; absent or ``null``: the class default."""
        value = self.number(*names, default=default)
        if not 0.0 <= value <= 1.0:
            raise self.error(names[0], f"must lie between 0 and 1, not be {value!r}")
        return value

    def text(self, *names: str, default: str) -> str:
        """A string; absent or ``null``: the class default."""
        value = self._get(names)
        if value is _MISSING or value is None:
            return default
        if not isinstance(value, str):
            raise self.error(names[0], f"must be a string, not {value!r}")
        return value

    def has_value(self, *names: str) -> bool:
        """Whether the field is given and not ``null``."""
        return self._get(names) not in (_MISSING, None)

    def per_layer(self, name: str, num_layers: int) -> list[object] | None:
        """A list with one entry a layer, or None where it is absent, ``null`` or empty."""
        value = self._get((name,))
        if value is _MISSING or value is None or value == []:
            return None
        if not isinstance(value, list) or len(value) != num_layers:
            length = len(value) if isinstance(value, list) else "no list"
            raise self.error(name, f"must list one entry for each of the {num_layers} layers, not {length}")
        return value

    def whole_numbers(self, name: str) -> tuple[int, ...]:
        """A list of whole numbers; absent or ``null``: empty."""
        value = self._get((name,))
        if value is _MISSING or value is None:
            return ()
        if not isinstance(value, list) or any(isinstance(item, bool) or not isinstance(item, int) for item in value):
            raise self.error(name, f"must be a list of whole numbers, not {value!r}")
        return tuple(value)

    def section(self, name: str) -> Mapping[str, object] | None:
        """A nested object, or None where it is absent, ``null`` or ``false``."""
        value = self._get((name,))
        if value is _MISSING or value is None or value is False:
            return None
        if not isinstance(value, dict):
            raise self.error(name, f"must be an object, not {value!r}")
        return value

    def rotary_frac(self, *names: str, default: float) -> float:
        """Share of a head that is rotated: at the top, or in ``rope_parameters`` or ``rope_scaling`` (newer files)."""
        for section_name in ("rope_parameters", "rope_scaling"):
            section = self.section(section_name)
            if section is not None and "partial_rotary_factor" in section:
                return Fields(section, self.family).fraction("partial_rotary_factor", default=default)
        return self.fraction(*names, default=default)
