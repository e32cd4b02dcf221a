"""The states of a session and its legal moves between them."""

from enum import StrEnum


class State(StrEnum):
    WAITING = "waiting"
    CONNECTING = "connecting"
    LIVE = "live"
    PAUSED = "paused"
    RECOVERING = "recovering"
    CLOSED = "closed"


MOVES: dict[State, frozenset[State]] = {
    State.WAITING: frozenset({State.CONNECTING, State.CLOSED}),
    State.CONNECTING: frozenset({State.LIVE, State.PAUSED, State.RECOVERING, State.CLOSED}),
    State.LIVE: frozenset({State.PAUSED, State.RECOVERING, State.CLOSED}),
    State.PAUSED: frozenset({State.LIVE, State.RECOVERING, State.CLOSED}),
    State.RECOVERING: frozenset({State.LIVE, State.PAUSED, State.CLOSED}),
    State.CLOSED: frozenset(),
}
"""Legal moves. A state may always stay what it is."""
