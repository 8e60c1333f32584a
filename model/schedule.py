"""The order of a segment's calls, without torch: pure, so that planning and simulation use the same."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Call:
    """One call of the transformer."""

    kind: Literal["prefill", "cell"]
    """`prefill`: the second one, with the reference that is in force after the first clip."""
    block: int
    """Counted over the whole video; of a prefill, the block that it comes before."""
    step: int
    replay: bool
    """A cell of the segment before, run again for its keys and values only."""


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
    A video that starts here (nothing carried) has its second prefill right before the first cell of its
    second clip, unless `reference` is `keep`. The prefill that opens the segment is not in the list.

    A cell needs the cell before it in its block (its input) and the same step of the block before (its keys
    and values); a second prefill needs the last cell of block 0. A wavefront layout may therefore reorder
    these calls so that block b, step s runs in wave b + s. The second prefill then goes between the last
    wave of the first clip and the next; cells of older blocks in the waves after it still read the old
    condition.
    """
    order = []
    second_clip = first_block + blocks_per_clip
    for block in range(first_block - carried_blocks, end_block):
        if block == second_clip and not carried_blocks and reference != "keep":
            order.append(Call("prefill", block, 0, replay=False))
        order += [Call("cell", block, step, replay=block < first_block) for step in range(sample_steps)]
    return order
