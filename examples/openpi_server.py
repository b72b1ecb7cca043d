# Docs: docs/frameworks.md. Serve a policy to openpi's clients: python examples/openpi_server.py pi0-tiny-pickcube-rgb
"""openpi's protocol, msgpack over a websocket, arrays as `WebsocketClientPolicy` of openpi-client writes and reads them.

The first message to a client says what is served; then each of its messages is an observation, and the answer holds "actions"
(H, A), a chunk in the environment's units. Text instead of a packed answer is an error, which the client raises.
"""

import asyncio
import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a file of a checkout runs that checkout's code
import pi_stepnft  # noqa: F401

sys.path.pop(0)

import msgpack
import numpy as np
import torch
import tyro
import websockets

from pi_stepnft import harness, policies


@dataclass
class Args:
    policy: tyro.conf.Positional[str]
    """a folder, a hub id, or the name of a bundled policy"""
    images: tuple[str, ...] = ("observation/image",)
    """entries of an observation that are pictures, (H, W, 3) uint8, in the order of the policy's cameras"""
    state: tuple[str, ...] = ("observation/state",)
    """entries that are its state, one behind the other, in the environment's units"""
    host: str = "127.0.0.1"
    """0.0.0.0: whoever reaches this machine is served"""
    port: int = 8000
    device: str = "cpu"
    seed: int = 0
    """of the noise, which is drawn in the order in which observations arrive"""


to_wire = lambda x: {b"__ndarray__": True, b"data": x.tobytes(), b"dtype": x.dtype.str, b"shape": x.shape}
from_wire = lambda x: np.frombuffer(x[b"data"], x[b"dtype"]).reshape(x[b"shape"]) if b"__ndarray__" in x else x


def act(policy: policies.Pi0, args: Args, message: bytes) -> bytes:
    seen = msgpack.unpackb(message, object_hook=from_wire)
    if missing := [name for name in (*args.images, *args.state, "prompt") if name not in seen]:
        raise ValueError(f"the observation has no {', '.join(missing)}, only {', '.join(seen)}; see --images and --state")
    obs = {"state": np.concatenate([np.atleast_1d(seen[name]) for name in args.state])[None]}
    if args.images:
        obs["image"] = np.stack([seen[name] for name in args.images])[None]
    return msgpack.packb(dict(actions=policy.act(obs, [seen["prompt"]])[0]), default=to_wire)


async def main(args: Args, policy: policies.Pi0) -> None:
    async def answer(client) -> None:
        with contextlib.suppress(websockets.ConnectionClosed):
            await client.send(msgpack.packb(dict(policy=args.policy, type=policy.config.type, horizon=policy.config.horizon)))
            async for message in client:
                try:
                    async with turn:  # in a thread: connections are kept alive meanwhile
                        reply = await asyncio.to_thread(act, policy, args, message)
                except Exception as error:  # the client is to know, whatever it is, and its next observation is served
                    reply = f"{type(error).__name__}: {error}"
                await client.send(reply)

    torch.manual_seed(args.seed)
    turn = asyncio.Lock()
    async with websockets.serve(answer, args.host, args.port, compression=None, max_size=None) as server:
        print("serving at ws://{}:{}".format(*server.sockets[0].getsockname()), flush=True)
        await server.serve_forever()


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    with harness.one_line_errors():
        asyncio.run(main(args, policies.load(args.policy, args.device)))
