"""The way back of a call: parts that are taken at once, and others' turn between them."""

import asyncio

from curvd_server.service.handlers import _Responses
from curvd_server.transport import Context, Drops, StallGuard


class FastReader(Context):
    """A call whose client takes each part at once."""

    def __init__(self):
        self.parts = []

    def write_soon(self, message):
        self.parts.append(message)
        return True


def test_whoever_reads_fast_leaves_the_loop_to_others_after_each_part():
    async def run():
        turns = 0

        async def count():
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        other = asyncio.create_task(count())
        context = FastReader()
        responses = _Responses(context, StallGuard(60, Drops()))
        for part in range(50):
            await responses.send(part)
        other.cancel()
        return context.parts, turns

    parts, turns = asyncio.run(run())
    assert parts == list(range(50))
    assert turns >= 49
