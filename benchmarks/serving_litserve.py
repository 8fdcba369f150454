"""A pipeline behind LitServe's batching, for `serving_models.py`: a module, since LitServe starts processes itself."""

import socket
from multiprocessing.connection import Connection
from typing import Any

import litserve
import torch
from transformers import pipeline


class Api(litserve.LitAPI):
    """A classifier whose batches a pipeline answers."""

    def __init__(self, folder: str, threads: int, **options: Any) -> None:
        super().__init__(**options)
        self.folder, self.threads = folder, threads

    def setup(self, device: str) -> None:
        """Load the model."""
        torch.set_num_threads(self.threads)
        self.pipe = pipeline("text-classification", model=self.folder, device="cpu", top_k=None)

    def decode_request(self, request: dict[str, str]) -> str:
        """Read a text."""
        return request["inputs"]

    def predict(self, texts: list[str]) -> list[Any]:
        """Answer texts."""
        return self.pipe(texts, batch_size=len(texts))

    def encode_response(self, output: Any) -> Any:
        """Return an answer as it is."""
        return output


def serve(folder: str, threads: int, said: Connection, *, keep_alive_s: float, **batches: Any) -> None:
    """Serve until the process is ended."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    said.send(f"http://127.0.0.1:{port}")
    server = litserve.LitServer(Api(folder, threads, **batches), accelerator="cpu", timeout=keep_alive_s)
    server.run(host="127.0.0.1", port=port, generate_client_file=False, log_level="warning")
