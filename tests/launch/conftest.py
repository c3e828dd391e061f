"""Fixtures of other rooms that commands need."""

from tests.task.conftest import glue_directory, task_content

__all__ = ["glue_directory", "task_content"]
