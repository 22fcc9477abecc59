"""What the server keeps for its clients: answers that nobody has read yet, and their sessions.

Gradio keeps both without a bound: a client that asks and never reads fills the memory.
"""

from typing import Any

from gradio.blocks import Blocks

MAX_SESSIONS = 64  # the state of those used last is kept
MAX_UNREAD = 64 * 2**20  # characters of answers that no client has read, in all sessions together


def bound_memory(page: Blocks) -> None:
    """Keep at most MAX_SESSIONS sessions and MAX_UNREAD characters of unread answers: beyond these
    the session with the most of them loses its answers, and its work ends."""
    page.state_session_capacity = MAX_SESSIONS
    queue: Any = page._queue
    send = queue.send_message

    def send_bounded(event: Any, message: Any) -> None:
        if event.session_hash not in queue.pending_messages_per_session:
            event.alive = False  # its session is gone
            return
        send(event, message)
        unread = {
            session: sum(size(waiting) for waiting in list(messages._queue))
            for session, messages in queue.pending_messages_per_session.items()
        }
        if sum(unread.values()) > MAX_UNREAD:
            forget(queue, max(unread, key=lambda session: unread[session]))

    queue.send_message = send_bounded


def forget(queue: Any, session: str) -> None:
    queue.pending_messages_per_session.pop(session, None)
    queue.pending_event_ids_session.pop(session, None)
    for event in list(queue.event_ids_to_events.values()):
        if event.session_hash == session:
            event.alive = False


def size(message: Any) -> int:
    """Characters of the values in an answer."""
    output = getattr(message, "output", None)  # other messages carry none
    return sum(len(str(value)) for value in (output or {}).get("data", []))
