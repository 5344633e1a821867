"""What every part of a job is made of."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class StrictModel(BaseModel):
    """Frozen and closed: an unknown key is an error, and so is a string where a number belongs."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
