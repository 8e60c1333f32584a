"""A lesson that is to be made: all that a run knows of it."""

from __future__ import annotations

from dataclasses import dataclass

from ray_jobs.lessons import output_name
from ray_jobs.results import Result
from ray_jobs.shared import content_key
from stages.types import Lesson, Prepared, Segment, SegmentJob


@dataclass(frozen=True)
class Order:
    """A checked lesson, and the result in which the run notes what becomes of it."""

    lesson: Lesson
    prepared: Prepared
    result: Result

    @property
    def output(self) -> str:
        """Name of the finished file in the output folder."""
        return output_name(self.lesson)

    @property
    def encodings(self) -> list[str]:
        """Encodings that others may use too: prompt, portrait, under guidance the negative prompt."""
        settings = self.lesson.settings
        negative = [content_key("prompt", settings.negative_prompt)] if settings.sample_guide_scale else []
        prompt, portrait = self.lesson.prompt, self.prepared.picture.sha256
        return [content_key("prompt", prompt), content_key("portrait", portrait), *negative]

    def job(self, segment: Segment, carried: bool) -> SegmentJob:
        """What the stages have to know to render one segment."""
        lesson, prepared = self.lesson, self.prepared
        last = segment is prepared.segments[-1] or lesson.settings.continuity == "independent"
        return SegmentJob(
            lesson.lesson_id, lesson.settings, prepared.picture, segment, prepared.frames, carried, last
        )
