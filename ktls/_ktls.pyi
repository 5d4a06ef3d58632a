import threading
from typing import final

from typing_extensions import Buffer

TX: int
RX: int
TX_ZEROCOPY_RO: int
RX_EXPECT_NO_PAD: int
TX_MAX_PAYLOAD_LEN: int
VERSION_1_2: int
VERSION_1_3: int
RECORD_NONE: int
REC_SEQ_SIZE: int
MAX_PAYLOAD: int

def cipher_table() -> list[tuple[int, str, int, int, int, int, bool, bool]]: ...
def attach(fd: int) -> None: ...
def install(
    fd: int,
    direction: int,
    *,
    version: int,
    cipher: int,
    key: bytes,
    iv: bytes,
    salt: bytes,
    rec_seq: bytes,
) -> None: ...
def update_key(
    fd: int,
    flags: int,
    *,
    request: int,
    version: int,
    cipher: int,
    key: bytes,
    iv: bytes,
    salt: bytes,
    rec_seq: bytes,
) -> int: ...
def installed(fd: int, direction: int) -> tuple[int, int] | None: ...
def query(fd: int, direction: int) -> tuple[int, int, bytes, bytes]: ...
def set_option(fd: int, option: int, value: int) -> None: ...
def get_option(fd: int, option: int) -> int: ...
def stream(fd: int) -> tuple[int, int, int, int]: ...
def send_record(fd: int, type: int, data: Buffer, flags: int = 0) -> int: ...
def flush(fd: int, flags: int = 0) -> None: ...
def push(fd: int) -> None: ...
def recv_record_into(fd: int, buffer: Buffer, flags: int = 0) -> tuple[int, int, bool]: ...
def recvfile(
    fd: int, pipe_out: int, pipe_in: int, file: int, offset: int, count: int
) -> tuple[int, int, int, int, BaseException | None]: ...

@final
class Lane:
    fd: int
    attention: bool
    nonblocking: bool
    used: int
    sent: int
    @property
    def limit(self) -> int: ...
    def __init__(
        self, fd: int, lock: threading.Lock, max_fragment: int, used: int, limit: int
    ) -> None: ...
    def sendfile(
        self, file: object, offset: int, count: int | None, /
    ) -> int | tuple[int, int] | None: ...
    def send_part(
        self, fd: int, file: int, offset: int, count: int, /
    ) -> tuple[int, int, BaseException | None]: ...
    def send(self, data: Buffer, flags: int, /) -> int | None: ...

@final
class Intake:
    fd: int
    attention: bool
    @property
    def kept(self) -> list[tuple[bytes, int, bool] | int]: ...
    def __init__(self, fd: int) -> None: ...
    def recv(self, size: int, flags: int, /) -> bytes | None: ...
    def recv_into(self, buffer: Buffer, flags: int, /) -> int | None: ...
