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
    "metadata": (None, {}),
    "modalities": (None, ["text"]),
    "moderation": (None,),
    "parallel_tool_calls": (None, True),
    "prediction": (None,),
    "prompt_cache_options": (None,),
    "prompt_cache_retention": (None,),
    "reasoning_effort": (None,),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None, ""),
    "verbosity": (None,),
    "web_search_options": (None,),
}
"""Fields and their values that change nothing."""

LABELS = ("user", "safety_identifier", "prompt_cache_key")
"""Fields that name the client or the request, and change no answer."""


def without_neutral_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields without those that change nothing.

    Raises:
      APIError: A field asks for something that is not supported. The message names all such fields.
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
    labels = [name for name in LABELS if isinstance(fields.get(name), str)]
    return {name: value for name, value in fields.items() if name not in NEUTRAL and name not in labels}


def _neutral(name: str, value: Any) -> bool:
    return any(type(value) is type(one) and value == one for one in NEUTRAL[name])
