"""Reads values of a parsed ``config.json`` and collects their problems."""

from collections.abc import Mapping
from typing import Any

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}
"""Hugging Face's names of the supported activation functions, and ours (``layer_spec.GatedMLP``)."""

GLOBAL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
"""Hugging Face's names of the kinds of layers, in ``layer_types``."""


class ConfigReader:
    """Reads values of a JSON object.

    Attributes:
      values: The object.
      problems: Problems found so far, one line each. Readers made from this one share the list.
    """

    def __init__(self, values: Mapping[str, Any], problems: list[str] | None = None):
        self.values = values
        self.problems: list[str] = [] if problems is None else problems

    def with_defaults(self, defaults: Mapping[str, Any]) -> "ConfigReader":
        """Returns a reader with values for keys that the object lacks. Null is such a key if its default is
        an object; elsewhere it may mean none, as for a window.
        """
        objects = {key for key, value in defaults.items() if isinstance(value, Mapping)}
        stated = {key: value for key, value in self.values.items() if value is not None or key not in objects}
        return ConfigReader({**defaults, **stated}, self.problems)

    def problem(self, text: str) -> None:
        """Adds a problem, once."""
        if text not in self.problems:
            self.problems.append(text)

    def refuse(self, *keys: str) -> None:
        """Notes a problem for each key that switches on an option; absent, null, 0 and false do not."""
        for key in keys:
            if self.values.get(key):
                self.problem(f"{key} {self.values[key]}")

    def integer(self, key: str, default: int | None = None) -> int:
        """Reads a positive integer. If the key is absent or null, returns the default or notes a problem."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.problem(f"{key} is {value!r}, expected a positive integer")
            return 1
        return value

    def optional_integer(self, key: str) -> int | None:
        """Reads a positive integer, or None if the key is absent or null."""
        return None if self.values.get(key) is None else self.integer(key)

    def number(self, key: str, default: float) -> float:
        """Reads a positive, finite number. Returns the default if the key is absent or null."""
        return default if self.values.get(key) is None else self.number_not_null(key, default)

    def optional_number(self, key: str) -> float | None:
        """Reads a positive, finite number, or None if the key is absent or null."""
        return None if self.values.get(key) is None else self.number_not_null(key, 1.0)

    def number_not_null(self, key: str, default: float) -> float:
        """Reads a positive, finite number. Returns the default if the key is absent; null is a problem."""
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            self.problem(f"{key} is {value!r}, expected a positive number")
            return default
        return float(value)

    def switch(self, key: str, default: bool = False) -> bool:
        """Reads true or false. Returns the default if the key is absent or null."""
        value = self.values.get(key)
        return default if value is None else bool(value)

    def names(self, key: str) -> list[str]:
        """Reads a list of strings, empty if absent or null."""
        value = self.values.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            self.problem(f"{key} is {value!r}, expected a list of names")
            return []
        return value

    def numbers(self, key: str, length: int) -> tuple[float, ...]:
        """Reads a list of ``length`` positive numbers."""
        value = self.values.get(key)
        if (
            isinstance(value, list)
            and len(value) == length
            and all(isinstance(x, int | float) and 0 < x < float("inf") for x in value)
        ):
            return tuple(float(x) for x in value)
        self.problem(f"{key} is {value!r:.60}, expected a list of {length} positive numbers")
        return (1.0,) * length

    def section(self, key: str) -> "ConfigReader":
        """Returns a reader of a nested object, empty if absent, that shares this reader's problems."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, Mapping):
            self.problem(f"{key} is {value!r}, expected an object")
            value = None
        return self.nested(value or {})

    def nested(self, values: Mapping[str, Any]) -> "ConfigReader":
        """Returns a reader of other values that shares this reader's problems."""
        return ConfigReader(values, self.problems)

    def activation(self, key: str = "hidden_act") -> str:
        """Reads the activation function of the MLP; silu if the key is absent."""
        name = self.values.get(key, "silu")
        if not isinstance(name, str) or name not in ACTIVATIONS:
            self.problem(f"{key} {name!r} (supported: {', '.join(ACTIVATIONS)})")
            return "silu"
        return ACTIVATIONS[name]

    def layer_types(self, default: list[str], supported: tuple[str, ...] = (GLOBAL, SLIDING)) -> list[str]:
        """Reads the kind of each layer.

        Args:
          default: Kinds if the key is absent or null.
          supported: Kinds that the family has.
        """
        kinds = self.names("layer_types") or default
        if others := sorted(set(kinds) - set(supported)):
            self.problem(f"layer_types {', '.join(others)} (supported: {', '.join(supported)})")
        if len(kinds) != len(default):
            self.problem(f"layer_types has {len(kinds)} entries for {len(default)} layers")
            return default
        return kinds

    def windows(self, kinds: list[str], window: int | None) -> list[int | None]:
        """Returns the window of each layer of these kinds; None for a global layer.

        Args:
          kinds: Result of ``layer_types``.
          window: Window of the sliding layers. None is a problem if there are any.
        """
        if window is None and SLIDING in kinds:
            self.problem(f"layer_types {SLIDING} without a sliding_window")
        return [window if kind == SLIDING else None for kind in kinds]
