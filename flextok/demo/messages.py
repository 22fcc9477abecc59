"""What clients send to the page's functions, and what the server keeps for them.

Gradio fetches the address, or copies the file, that a client names in place of any value; and it
keeps answers that nobody has read without a bound in bytes.
"""

import re
from collections.abc import Awaitable, Callable, Collection

from fastapi import HTTPException, Request
from gradio.blocks import Blocks
from gradio.data_classes import PredictBody
from gradio.queueing import Event
from gradio.server_messages import EventMessage, ProcessCompletedMessage, ProcessGeneratingMessage
from pydantic import ValidationError

JOIN = "/gradio_api/queue/join"
SESSION = re.compile(r"\w{1,64}")
MAX_SESSIONS = 64  # the state of those used last is kept
MAX_UNREAD = 64 * 2**20  # characters of answers that no client has read, in all sessions together


def message_check(functions: Collection[int]) -> Callable[[Request], Awaitable[None]]:
    """A FastAPI dependency that answers 400 to a click that the page would not send: of another
    function than those of these numbers, or with values that are not plain texts and numbers."""

    async def check(request: Request) -> None:
        if request.url.path.rstrip("/") != JOIN:
            return
        try:
            asked = PredictBody.model_validate_json(await request.body())
        except ValidationError:
            return  # Gradio answers 422 by itself
        if asked.fn_index not in functions:
            raise HTTPException(400, "the page has no such function")
        if not SESSION.fullmatch(asked.session_hash or ""):
            raise HTTPException(400, "there is no such session")
        if any(isinstance(value, dict | list) for value in asked.data):
            raise HTTPException(400, "the page sends texts and numbers only")

    return check


def bound_memory(page: Blocks) -> None:
    """Keep at most MAX_SESSIONS sessions and MAX_UNREAD characters of unread answers: beyond these
    the session with the most of them loses its answers, and its work ends."""
    page.state_session_capacity = MAX_SESSIONS
    queue = page._queue
    waiting, events = queue.pending_messages_per_session, queue.event_ids_to_events
    send = queue.send_message

    def send_bounded(event: Event, message: EventMessage) -> None:
        if event.session_hash not in waiting:
            event.alive = False  # its session was forgotten
            return
        send(event, message)
        unread = {name: sum(map(size, list(kept._queue))) for name, kept in waiting.items()}
        if sum(unread.values()) > MAX_UNREAD:
            largest = max(unread, key=lambda name: unread[name])
            waiting.pop(largest, None)
            queue.pending_event_ids_session.pop(largest, None)
            for other in list(events.values()):
                other.alive = other.alive and other.session_hash != largest

    queue.send_message = send_bounded  # type: ignore


def size(message: EventMessage) -> int:
    """Characters of the values in an answer; other messages carry none."""
    if not isinstance(message, ProcessCompletedMessage | ProcessGeneratingMessage):
        return 0
    return sum(len(str(value)) for value in message.output.get("data", []))
