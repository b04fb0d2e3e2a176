"""A WebSocket server by the Python package `websockets`: it greets with its name and echoes."""

import asyncio
import sys

import websockets

name, port = sys.argv[1], int(sys.argv[2])


async def serve(connection):
    await connection.send(name)
    async for message in connection:
        await connection.send(message)


async def main():
    async with websockets.serve(serve, host=None, port=port, max_size=None, ping_interval=None):
        print("listening", flush=True)
        await asyncio.Future()


asyncio.run(main())
