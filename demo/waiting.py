"""The queue: one client's requests never keep another's waiting for more than one piece of work.

Clients take turns: first the addresses that requests come from, then the sessions (browser tabs, gradio clients) of an
address; within a session first come, first served. What one session and one address may have waiting is bounded.
"""

from __future__ import annotations

import itertools
from collections import Counter

import gradio as gr
from gradio.queueing import Event, Queue

MOST_WAITING, MOST_OF_SESSION, MOST_OF_ADDRESS = 100, 25, 50
SAID = "{} {} requests waiting, the most there may be. Wait until one is done, or stop it."


class FairQueue(Queue):
    """Gradio's queue, in which clients take turns."""

    async def push(self, body, request, username):
        """As gradio's: (whether the request is in the queue, its id or why not, a state)."""
        waiting = [_client(event) for event in self._waiting()]
        address = _address(request)
        if sum(client == (address, body.session_hash) for client in waiting) >= MOST_OF_SESSION:
            return False, SAID.format("You have", MOST_OF_SESSION), "error"
        if sum(client[0] == address for client in waiting) >= MOST_OF_ADDRESS:
            return False, SAID.format("Your address has", MOST_OF_ADDRESS), "error"
        return await super().push(body, request, username)

    def get_events(self):
        """The next piece of work: of the client that has waited longest since its last turn."""
        for queue in self.event_queue_per_concurrency_id.values():
            if len(queue.queue) > 1:
                queue.queue.sort(key=self._turn)  # stable: a client's own stay in their order
        found = super().get_events()
        for event in found[0] if found else ():
            self._served(_client(event))
        return found

    def _waiting(self) -> list[Event]:
        return [event for queue in self.event_queue_per_concurrency_id.values() for event in queue.queue]

    def _turn(self, event: Event) -> tuple[int, int]:
        address, session = _client(event)
        return self.turns[address], self.turns[address, session]

    def _served(self, client: tuple[str, str]) -> None:
        self.turns[client[0]] = self.turns[client] = next(self.count)
        there = {_client(event) for event in self._waiting()}
        keep = {*there, *(address for address, _ in there), client, client[0]}
        for key in [key for key in self.turns if key not in keep]:
            del self.turns[key]


def take_turns(page: gr.Blocks) -> gr.Blocks:
    """The page with a fair queue, and no way past it."""
    page.queue(max_size=MOST_WAITING, default_concurrency_limit=1, api_open=False)
    page._queue.__class__ = FairQueue  # all else about it is as gradio made it
    page._queue.turns, page._queue.count = Counter(), itertools.count(1)
    return page


def _client(event: Event) -> tuple[str, str]:
    return _address(event.request), event.session_hash


def _address(request) -> str:
    client = getattr(request, "client", None)
    return str(client.host) if client else ""
