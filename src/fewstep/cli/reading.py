"""Reading what was typed."""

from __future__ import annotations

import json
from typing import Any

from fewstep.errors import InvalidInputError


def json_object(option: str, text: str) -> dict[str, Any]:
    """Read an option that is a JSON object.

    Raises:
        InvalidInputError: It is not.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InvalidInputError(f"{option} {text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidInputError(
            f"{option} {text!r} is not a JSON object; give names and values, such as '{{\"name\": 1}}'"
        )
    return value
