"""The base of everything a user writes."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class UserModel(BaseModel):
    """Frozen, and an unknown key is an error; each field has its docstring under it.

    Pydantic could read those docstrings (``use_attribute_docstrings``), but parses every class's source to do so, which
    made an eighth of the time in which ``vramplan fit`` starts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)
