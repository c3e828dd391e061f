"""Everything that is wrong with a run, gathered while its plan is made and told together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from huggingface_hub.errors import StrictDataclassError

Found = TypeVar("Found")


class Problems:
    """Everything that was found wrong, told together."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def of(self, action: Callable[[], Found]) -> Found | None:
        """What an action returns, or None after noting why it could not."""
        try:
            return action()
        except ValueError as error:
            self.found.append(str(error))
        except StrictDataclassError as error:  # how transformers refuses a value in a config
            self.found.append(f"student.overrides: {' '.join(str(error).split())}")
        return None

    def note(self, problem: str | None) -> None:
        """One more, if there is one."""
        if problem is not None:
            self.found.append(problem)

    def error(self) -> ValueError:
        """All of them as one error."""
        return ValueError("\n".join(dict.fromkeys(self.found)))
