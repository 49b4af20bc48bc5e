"""A process that runs clients for :class:`~neurocl.federated.exchange.ProcessExchange` until its pipe is closed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from multiprocessing.connection import Connection

import torch

from neurocl.errors import NeuroclError
from neurocl.federated.catalog import method_for, problem_for
from neurocl.federated.config import FederatedConfig
from neurocl.federated.exchange import LARGEST_REPLY, client_of, run_client
from neurocl.federated.method import Phase, Place
from neurocl.federated.payload import Payload, decode, encode

LARGEST_HEADER = 1 << 20


def serve(pipe: Connection) -> None:
    """Answer the parent: for every request a header, a message and what the client has kept, and the same back."""
    # A Ctrl-C at the terminal reaches the whole group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    config = FederatedConfig.model_validate_json(pipe.recv_bytes(LARGEST_HEADER))
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    problem = problem_for(config)
    method = method_for(problem)
    while True:
        header = json.loads(pipe.recv_bytes(LARGEST_HEADER))
        message, kept = pipe.recv_bytes(LARGEST_REPLY), decode(pipe.recv_bytes(LARGEST_REPLY))
        if header["fault"] == "die":
            os._exit(9)
        if header["fault"] == "hang":
            signal.pause()
        place = Place(problem.tasks[header["task"]], Phase(*header["phase"]), header["round"])
        store = {name: array.copy() for name, array in kept.arrays.items()}
        client = client_of(problem, header["client"], place, store)
        try:
            data = run_client(method, client, place, message, header["fault"])
        except Exception as error:  # whatever a client does, the run goes on
            text = str(error) if isinstance(error, NeuroclError) else f"{type(error).__name__}: {error}"
            pipe.send_bytes(json.dumps({"error": text or "no message"}).encode())
            continue
        pipe.send_bytes(json.dumps({"error": ""}).encode())
        pipe.send_bytes(data)
        pipe.send_bytes(encode(Payload(client.store)))


if __name__ == "__main__":
    with contextlib.suppress(EOFError, OSError):
        serve(Connection(int(sys.argv[1])))
