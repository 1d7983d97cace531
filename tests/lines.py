"""What a command told its user on stderr, among what the packages it imports may print there."""


def told_by(name: str, stderr: str) -> str:
    """The one line of a command, `NAME: ...`; it is the last."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    own = [line for line in lines if line.startswith(f"{name}: ")]
    assert len(own) == 1 and own == lines[-1:], stderr
    return own[0]
