"""The address: what is sent there goes at once."""

import asyncio
import socket

import pytest

from dsjax.serving.run import listening


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_answers_do_not_wait_for_acknowledgements(host):
    """Otherwise the end of an answer on a connection that is used again waits 40 ms for the client's system."""

    async def accepted():
        options = asyncio.get_running_loop().create_future()

        def connected(_, writer):
            options.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with listening(host, 0) as sock:
            server = await asyncio.start_server(connected, sock=sock)
            _, writer = await asyncio.open_connection(host, sock.getsockname()[1])
            found = await options
            writer.close()
            server.close()
        return found

    assert asyncio.run(accepted())
