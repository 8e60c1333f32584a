"""The order of a segment's calls, without torch: pure, so that planning and simulation use the same."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Call:
    """One call of the transformer."""

    kind: Literal["prefill", "cell"]
    """`prefill`: the second one, after which the reference is that of the clips after the first."""
    block: int
    """Counted over the whole video; of a prefill, the block that it comes before."""
    step: int
    replay: bool
    """A cell of the segment before, run again for its keys and values only; or the prefill after those of the
    first clip, whose reference and motion come from the carry."""


def calls(
    first_block: int,
    end_block: int,
    carried_blocks: int,
    sample_steps: int,
    blocks_per_clip: int,
    reference: str,
) -> list[Call]:
    """Calls of the segment [first_block, end_block) for one rank that holds all steps and layers, in order.

    Block by block, each with all of its steps; the `carried_blocks` before the segment are replayed first.
    Unless `reference` is `keep`, a second prefill comes right before the first cell of the video's second
    clip, if its first clip is run here: because the video starts here (nothing carried), or because what is
    carried is blocks 0 on. The prefill that opens the segment is not in the list.

    A cell needs the cell before it in its block (its input) and the same step of the block before (its keys
    and values); a second prefill needs the last cell of block 0. A wavefront layout may therefore reorder
    these calls so that block b, step s runs in wave b + s. The second prefill then goes between the last
    wave of the first clip and the next; cells of older blocks in the waves after it still read the old
    condition.
    """
    order = []
    first_cell = first_block - carried_blocks
    has_first_clip = not carried_blocks or first_cell == 0
    for block in range(first_cell, end_block):
        if block == first_cell + blocks_per_clip and has_first_clip and reference != "keep":
            order.append(Call("prefill", block, 0, replay=carried_blocks > 0))
        order += [Call("cell", block, step, replay=block < first_block) for step in range(sample_steps)]
    return order
