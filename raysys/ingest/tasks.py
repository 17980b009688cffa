"""Runs plain functions as Ray Data tasks: Ray spreads and streams, nothing is shuffled.

rows -> run_tasks() -> each row's answer, in order; one Ray task a row, on whichever node has room
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import ray

from raysys import errors
from raysys.errors import RaysysError

Task = Callable[[Any], dict[str, Any]]


def run_tasks(task: Task, rows: Sequence[Any], *, num_cpus: float) -> list[dict[str, Any]]:
    """Returns what `task` answers to each row, in order.

    Args:
      task: Answers with plain JSON values; data goes through the root. It may run again if its node
        dies, so it must write the same objects again.
      num_cpus: Reserved for each task.

    Raises:
      RaysysError: What a task raised, by its own class.
    """
    held = ray.put(list(rows))
    dataset = ray.data.range(len(rows), override_num_blocks=max(len(rows), 1))
    done = dataset.map(functools.partial(_answer, task=task, rows=held), num_cpus=num_cpus)
    answers = sorted(done.take_all(), key=lambda row: row["id"])
    return [_unpack(row["answer"]) for row in answers]


def _answer(row: dict[str, Any], task: Task, rows: ray.ObjectRef[list[Any]]) -> dict[str, Any]:
    try:
        answer = {"value": task(ray.get(rows)[row["id"]])}
    except RaysysError as error:
        # Ray would wrap it, and the job's exit code would not tell whether to try again.
        answer = {"error": {"kind": type(error).__name__, "message": str(error)}}
    # As text: Ray Data would make tensors and structs of what is a plain answer.
    return {"id": row["id"], "answer": json.dumps(answer)}


def _unpack(text: str) -> dict[str, Any]:
    answer: dict[str, dict[str, Any]] = json.loads(text)
    if "error" in answer:
        raise getattr(errors, answer["error"]["kind"])(answer["error"]["message"])
    return answer["value"]
