"""Which finished file in the output folder is the product of which inputs: one small record per lesson."""

from __future__ import annotations

from ray_jobs.folder import Folder
from ray_jobs.lessons import output_name
from ray_jobs.store import Store
from stages.identity import delivery_id
from stages.types import Lesson, Measured, Prepared, as_dict


class Deliveries:
    """Records of the finished files of one output folder, read when a run begins.

    Args:
        out: where the finished files are.
        home: the output folder's own store; a store that several folders share knows nothing of their files.
    """

    def __init__(self, out: Folder, home: Store) -> None:
        self._out, self._home = out, home
        self._records = home.lessons()

    def find(self, lesson: Lesson, prepared: Prepared) -> Measured | None:
        """What was measured of the lesson's finished file, if exactly this lesson was delivered and is still
        there."""
        record = self._records.get(lesson.lesson_id)
        name = output_name(lesson)
        if (
            record is None
            or record["delivery"] != delivery_id(prepared, lesson.settings)
            or record["output"] != name
        ):
            return None
        measured = Measured(**{**record["measured"], "warnings": tuple(record["measured"]["warnings"])})
        return measured if self._out.size(name) == measured.bytes else None

    def record(self, lesson: Lesson, prepared: Prepared, measured: Measured) -> None:
        """Written after the finished file is in place, so that a crash in between costs a mux and tells no
        lie."""
        delivery = delivery_id(prepared, lesson.settings)
        value = {"output": output_name(lesson), "delivery": delivery, "measured": as_dict(measured)}
        self._home.put_lesson(lesson.lesson_id, value)
