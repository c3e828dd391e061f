"""The base of all settings: frozen, and no unknown keys."""

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """Settings that refuse what they do not know and cannot change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
