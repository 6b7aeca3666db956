"""Who may call a server, and how much of it one client can take."""

from __future__ import annotations

import dataclasses
import hmac
import ssl
import stat
from pathlib import Path

import grpc

_SHORTEST = 16  # characters of a token


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a server takes at most.

    Attributes:
      batch: images in a request.
      message: bytes in a request.
      requests: under way.
      connections: open at once, to REST and to gRPC each.
      seconds: the longest deadline, and that of a request without one.
      reading: seconds in which a connection has to bring a whole request.
      draining: seconds for what is under way, when the server ends.
    """

    batch: int = 64
    message: int = 8 << 20
    requests: int = 1024
    connections: int = 1000
    seconds: float = 10.0
    reading: float = 10.0
    draining: float = 20.0


@dataclasses.dataclass(frozen=True)
class Tls:
    """Certificates.

    Attributes:
      certificate, key: of this side, PEM files.
      authority: of the certificates that the other side must have, a PEM file; None if it need
        have none.
    """

    certificate: Path
    key: Path
    authority: Path | None = None

    def server(self) -> grpc.ServerCredentials:
        """For a gRPC server; with an authority, clients without its certificate are refused."""
        pair = (self.key.read_bytes(), self.certificate.read_bytes())
        authority = None if self.authority is None else self.authority.read_bytes()
        return grpc.ssl_server_credentials([pair], authority, self.authority is not None)

    def uvicorn(self) -> dict[str, object]:
        """The same for uvicorn."""
        options: dict[str, object] = {
            "ssl_certfile": str(self.certificate),
            "ssl_keyfile": str(self.key),
        }
        if self.authority is not None:
            options |= {"ssl_ca_certs": str(self.authority), "ssl_cert_reqs": ssl.CERT_REQUIRED}
        return options


class Tokens:
    """Bearer tokens (RFC 6750), any of which opens the server."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = [token.encode() for token in tokens]

    def allow(self, header: str | bytes | None) -> bool:
        """Whether the header `Authorization` has one of the tokens; compared in constant time."""
        data = header.encode() if isinstance(header, str) else header or b""
        kind, _, token = data.partition(b" ")
        found = [hmac.compare_digest(token.strip(), known) for known in self._tokens]
        return kind.lower() == b"bearer" and any(found)


def read_tokens(path: Path) -> Tokens:
    """The tokens of a file, one a line.

    Raises:
      ValueError: if others can read the file, it holds none, or one is short.
    """
    if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ValueError(f"others can read {path}; do chmod 600 {path}")
    tokens = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not tokens or min(map(len, tokens)) < _SHORTEST:
        raise ValueError(
            f"{path} holds {len(tokens)} tokens; give one a line, each of {_SHORTEST} characters "
            "or more."
        )
    return Tokens(tokens)
