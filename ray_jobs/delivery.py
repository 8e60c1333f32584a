"""Which finished file in the output folder is the product of which inputs: one small record per lesson."""

from __future__ import annotations

from ray_jobs.folder import Folder
from ray_jobs.orders import Order
from ray_jobs.store import Store
from stages.identity import delivery_id
from stages.types import Measured, as_dict


class Deliveries:
    """Records of the finished files of one output folder, read when a run begins.

    Args:
        out: where the finished files are.
        home: the output folder's own store; one that several folders share knows nothing of their files.
    """

    def __init__(self, out: Folder, home: Store) -> None:
        self._out, self._home = out, home
        self._records = home.lessons()

    def find(self, order: Order) -> Measured | None:
        """What was measured of the lesson's file, if it was made from exactly this and is still there."""
        record = self._records.get(order.lesson.lesson_id, {})
        if (record.get("delivery"), record.get("output")) != (_identity(order), order.output):
            return None
        measured = Measured(**{**record["measured"], "warnings": tuple(record["measured"]["warnings"])})
        return measured if self._out.size(order.output) == measured.bytes else None

    def record(self, order: Order, measured: Measured) -> None:
        """Note a finished file, once it is in place: a crash in between costs a mux and tells no lie."""
        value = {"output": order.output, "delivery": _identity(order), "measured": as_dict(measured)}
        self._home.put_lesson(order.lesson.lesson_id, value)


def _identity(order: Order) -> str:
    return delivery_id(order.prepared, order.lesson.settings)
