"""Fields of OpenAI's protocol that this server does not support.

A client may send such a field with a value that changes nothing. Any other value is refused by name.
"""

from typing import Any

from grinqh_jax.server.errors import APIError

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "function_call": (None,),
    "functions": (None, []),
    "modalities": (None, ["text"]),
    "moderation": (None,),
    "prediction": (None,),
    "prompt_cache_options": (None,),
    "reasoning_effort": (None,),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None, ""),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
}
"""Fields and their values that change nothing."""

LABELS = ("user", "safety_identifier", "metadata", "prompt_cache_key", "prompt_cache_retention")
"""Fields about the client, the request or storage, which change no answer. Each is a string, except for
``metadata``, an object of strings."""


def without_neutral_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields without those that change nothing.

    Raises:
      APIError: A field asks for something that is not supported; the message names all such fields. Or a
        label has a wrong type.
    """
    refused = [name for name, value in fields.items() if name in NEUTRAL and not _neutral(name, value)]
    if refused:
        are = "is" if len(refused) == 1 else "are"
        raise APIError(
            400,
            f"{', '.join(refused)} {are} not supported by this server; leave out",
            param=refused[0],
            code="unsupported_parameter",
        )
    for name in LABELS:
        if name in fields and not _is_label(name, fields[name]):
            kind = "an object of strings" if name == "metadata" else "a string"
            raise APIError(400, f"{name}: expected {kind}", param=name)
    return {name: value for name, value in fields.items() if name not in NEUTRAL and name not in LABELS}


def _is_label(name: str, value: Any) -> bool:
    if name != "metadata":
        return value is None or isinstance(value, str)
    return value is None or (isinstance(value, dict) and all(isinstance(v, str) for v in value.values()))


def _neutral(name: str, value: Any) -> bool:
    return any(type(value) is type(one) and value == one for one in NEUTRAL[name])
