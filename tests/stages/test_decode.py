"""One segment from latents to H.264, with a decoder whose frames say which latent they came from."""

import io
from typing import Any

import av
import numpy as np
import pytest
import torch

from stages import decode
from stages.decode import SegmentDecoder, to_uint8
from stages.types import Picture, PortraitLatents, Segment, SegmentJob
from tests.stages.media import settings


class Stream:
    """Makes four 64x64 frames of each latent, as bright as the latent is large."""

    def push(self, latents_CTHW):
        levels = latents_CTHW[0, :, 0, 0].repeat_interleave(4)
        return levels.view(1, -1, 1, 1).expand(3, -1, 64, 64)


class Vae:
    def stream(self):
        return Stream()

    def require_carried(self):
        """Its decoder looks nowhere but at the latent itself."""


VAE: Any = Vae()
PICTURE = Picture(64, 64, (0, 0, 64, 64), 64, 64, 0.0, "")


def job(first_block, end_block, frames, **changes):
    segment = Segment(0, first_block, end_block, 0, 0, "id")
    return SegmentJob(
        "a", settings(crf=1, **changes), PICTURE, segment, frames, carried=first_block > 0, last=True
    )


def latents(block):
    """[16, 3, 8, 8]: latent f of the whole video has the value -0.9 + f / 20."""
    values = -0.9 + torch.arange(3 * block, 3 * block + 3) / 20
    return values.view(1, 3, 1, 1).expand(16, 3, 8, 8)


def decoded(data):
    """Brightness of every frame, as the latent that it came from."""
    with av.open(io.BytesIO(data), "r") as file:
        means = [frame.to_ndarray(format="gray").mean() for frame in file.decode(video=0)]
    return [round((mean / 127.5 - 1 + 0.9) * 20) for mean in means]


def render(first_block, end_block, frames):
    segment = SegmentDecoder(VAE, job(first_block, end_block, frames), torch.zeros(16, 7, 8, 8))
    counts = [segment.decode(block, latents(block)) for block in range(first_block, end_block)]
    return counts, decoded(segment.finish())


def test_a_lesson_drops_three_frames_in_front_and_ends_with_its_last():
    counts, frames = render(0, 2, 20)
    assert counts == [9, 20]
    assert frames == [0] * 1 + [n for n in range(1, 5) for _ in range(4)] + [5] * 3


def test_segments_follow_each_other_without_gap_or_repetition():
    whole = render(0, 8, 90)[1]
    assert render(0, 4, 90)[1] + render(4, 8, 90)[1] == whole
    assert len(whole) == 90


def test_blocks_out_of_order_are_refused():
    segment = SegmentDecoder(VAE, job(0, 2, 20), torch.zeros(16, 7, 8, 8))
    with pytest.raises(ValueError, match="expected block 0"):
        segment.decode(1, latents(1))


def test_a_segment_with_a_missing_block_is_not_finished():
    segment = SegmentDecoder(VAE, job(0, 2, 20), torch.zeros(16, 7, 8, 8))
    segment.decode(0, latents(0))
    with pytest.raises(ValueError, match="block 1 was never decoded"):
        segment.finish()


def test_the_first_clip_is_kept_only_where_it_is_asked_for():
    chosen = job(0, 5, 57, reference="first_latent_and_motion")
    segment = SegmentDecoder(VAE, chosen, torch.zeros(16, 7, 8, 8))
    for block in range(5):
        segment.decode(block, latents(block))
    assert segment.first_clip().shape == (45, 64, 64, 3)
    other = SegmentDecoder(VAE, job(0, 1, 9), torch.zeros(16, 7, 8, 8))
    other.decode(0, latents(0))
    with pytest.raises(ValueError, match="first_latent_and_motion"):
        other.first_clip()


def test_a_lesson_begins_with_the_motion_latents_that_upstream_primes_with():
    portrait = PortraitLatents(
        torch.zeros(16, 1, 8, 8), torch.arange(19.0).view(1, 19, 1, 1).expand(16, 19, 8, 8)
    )
    assert decode.history(portrait, None)[0, :, 0, 0].tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_pixels_are_rounded_to_the_nearest_and_clamped():
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 1.5]).view(1, 1, 1, 5).expand(3, 1, 1, 5)
    assert to_uint8(values)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]
    assert to_uint8(values).dtype == np.uint8
