"""What can be wrong with weights. No torch here."""


class CheckpointError(Exception):
    """The weights cannot be used. The message names files, tensors and the rule, one problem per line."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems
