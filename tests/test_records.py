"""Records: RFC 8448's own bytes, round trips and tampering, and cutting streams into records."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ktls.errors import KeyMaterialError
from ktls.records import (
    HEADER_SIZE,
    InvalidTag,
    MessageReader,
    RecordCipher,
    RecordReader,
    split,
)
from ktls.types import MAX_PAYLOAD, Cipher, CryptoInfo, HandshakeType, RecordType, Version

from .test_keyschedule import RFC8448_KEYS, unhex

# RFC 8448 section 3, "Simple 1-RTT Handshake": complete records as sent.
SERVER_HELLO = unhex(
    """
    160303005a020000560303a6af06a4121860dc5e6e60249cd34c95930c8ac5cb
    1434dac155772ed3e2692800130100002e00330024001d0020c9828876112095
    fe66762bdbf7c672e156d6cc253b833df1dd69b1b04e751f0f002b00020304"""
)
SERVER_FLIGHT = unhex(
    """
    17030302a2d1ff334a56f5bff6594a07cc87b580233f500f45e489e7f33af35e
    df7869fcf40aa40aa2b8ea73f848a7ca07612ef9f945cb960b4068905123ea78
    b111b429ba9191cd05d2a389280f526134aadc7fc78c4b729df828b5ecf7b13b
    d9aefb0e57f271585b8ea9bb355c7c79020716cfb9b1183ef3ab20e37d57a6b9
    d7477609aee6e122a4cf51427325250c7d0e509289444c9b3a648f1d71035d2e
    d65b0e3cdd0cbae8bf2d0b227812cbb360987255cc744110c453baa4fcd61092
    8d809810e4b7ed1a8fd991f06aa6248204797e36a6a73b70a2559c09ead68694
    5ba246ab66e5edd8044b4c6de3fcf2a89441ac66272fd8fb330ef8190579b368
    4596c960bd596eea520a56a8d650f563aad27409960dca63d3e688611ea5e22f
    4415cf9538d51a200c27034272968a264ed6540c84838d89f72c24461aad6d26
    f59ecaba9acbbb317b66d902f4f292a36ac1b639c637ce343117b65962224531
    7b49eeda0c6258f100d7d961ffb138647e92ea330faeea6dfa31c7a84dc3bd7e
    1b7a6c7178af36879018e3f252107f243d243dc7339d5684c8b0378bf30244da
    8c87c843f5e56eb4c5e8280a2b48052cf93b16499a66db7cca71e4599426f7d4
    61e66f99882bd89fc50800becca62d6c74116dbd2972fda1fa80f85df881edbe
    5a37668936b335583b599186dc5c6918a396fa48a181d6b6fa4f9d62d513afbb
    992f2b992f67f8afe67f76913fa388cb5630c8ca01e0c65d11c66a1e2ac4c859
    77b7c7a6999bbf10dc35ae69f5515614636c0b9b68c19ed2e31c0b3b66763038
    ebba42f3b38edc0399f3a9f23faa63978c317fc9fa66a73f60f0504de93b5b84
    5e275592c12335ee340bbc4fddd502784016e4b3be7ef04dda49f4b440a30cb5
    d2af939828fd4ae3794e44f94df5a631ede42c1719bfdabf0253fe5175be898e
    750edc53370d2b"""
)
CLIENT_FINISHED = unhex(
    """
    170303003575ec4dc238cce60b298044a71e219c56cc77b0517fe9b93c7a4bfc
    44d87f38f80338ac98fc46deb384bd1caeacab6867d726c40546"""
)
TICKET = unhex(
    """
    17030300de3a6b8f90414a97d6959c3487680de5134a2b240e6cffac116e95d4
    1d6af8f6b580dcf3d11d63c758db289a015940252f55713e061dc13e078891a3
    8efbcf5753ad8ef170ad3c7353d16d9da773b9ca7f2b9fa1b6c0d4a3d03f75e0
    9c30ba1e62972ac46f75f7b981be63439b2999ce13064615139891d5e4c5b406
    f16e3fc181a77ca475840025db2f0a77f81b5ab05b94c01346755f69232c8651
    9d86cbeeac87aac347d143f9605d64f650db4d023e70e952ca49fe5137121c74
    bc2697687e248746d6df353005f3bce18696129c8153556b3b6c6779b37bf159
    85684f"""
)
CLIENT_DATA = unhex(
    """
    1703030043a23f7054b62c94d0affafe8228ba55cbefacea42f914aa66bcab3f
    2b9819a8a5b46b395bd54a9a20441e2b62974e1f5a6292a2977014bd1e3deae6
    3aeebb21694915e4"""
)
SERVER_DATA = unhex(
    """
    17030300432e937e11ef4ac740e538ad36005fc4a46932fc3225d05f82aa1b36
    e30efaf97d90e6dffc602dcb501a59a8fcc49c4bf2e5f0a21c0047c2abf33254
    0dd032e167c2955d"""
)
CLIENT_CLOSE = unhex("1703030013c9872760655666b74d7ff1153efd6db6d0b0e3")
SERVER_CLOSE = unhex("1703030013b58fd67166ebf599d24720cfbe7efa7a8864a9")
DATA = bytes(range(50))
CLOSE_NOTIFY = b"\1\0"

OPENABLE = [
    Cipher.AES_GCM_128,
    Cipher.AES_GCM_256,
    Cipher.AES_CCM_128,
    Cipher.CHACHA20_POLY1305,
]
SUITES = [(version, cipher) for version in Version for cipher in OPENABLE]
suites = pytest.mark.parametrize(("version", "cipher"), SUITES)


def rfc8448(label: str, rec_seq: int = 0) -> RecordCipher:
    """The protection of RFC 8448's trace, for one of its traffic secrets."""
    _, key, iv = map(unhex, RFC8448_KEYS[label])
    cipher = Cipher.AES_GCM_128
    return RecordCipher(CryptoInfo(Version.TLS_1_3, cipher, key, iv[4:], iv[:4], rec_seq))


def info_for(version: Version, cipher: Cipher, rec_seq: int = 0, iv: bytes = b"") -> CryptoInfo:
    """Some keys."""
    return CryptoInfo(
        version,
        cipher,
        key=bytes(range(cipher.key_size)),
        iv=iv or bytes(range(0x60, 0x60 + cipher.iv_size)),
        salt=bytes(range(0x80, 0x80 + cipher.salt_size)),
        rec_seq=rec_seq,
    )


def test_rfc8448_server_flight() -> None:
    """EncryptedExtensions to Finished: four messages of the sizes that the RFC prints."""
    cipher = rfc8448("SERVER_HANDSHAKE_TRAFFIC_SECRET")
    content_type, content = cipher.open(SERVER_FLIGHT)
    assert (content_type, len(content)) == (RecordType.HANDSHAKE, 657)
    messages = MessageReader().feed(content)
    sizes = [(kind, 4 + len(body)) for kind, body in messages]
    assert sizes == [(8, 40), (11, 445), (15, 136), (HandshakeType.FINISHED, 36)]
    assert messages[-1][1] == unhex(
        "9b9b141d906337fbd2cbdce71df4deda4ab42c309572cb7fffee5454b78f0718"
    )


@pytest.mark.parametrize(
    ("label", "records", "contents"),
    [
        ("SERVER_HANDSHAKE_TRAFFIC_SECRET", [SERVER_FLIGHT], [(22, None)]),
        ("CLIENT_HANDSHAKE_TRAFFIC_SECRET", [CLIENT_FINISHED], [(22, None)]),
        (
            "SERVER_TRAFFIC_SECRET_0",
            [TICKET, SERVER_DATA, SERVER_CLOSE],
            [(22, None), (23, DATA), (21, CLOSE_NOTIFY)],
        ),
        (
            "CLIENT_TRAFFIC_SECRET_0",
            [CLIENT_DATA, CLIENT_CLOSE],
            [(23, DATA), (21, CLOSE_NOTIFY)],
        ),
    ],
)
def test_rfc8448_records(
    label: str, records: list[bytes], contents: list[tuple[int, bytes | None]]
) -> None:
    """Every protected record opens, and sealing its content gives the RFC's bytes again."""
    opening, sealing = rfc8448(label), rfc8448(label)
    for record, (content_type, content) in zip(records, contents, strict=True):
        opened = opening.open(record)
        assert opened[0] == content_type
        assert content is None or opened[1] == content
        assert sealing.seal(*opened) == record
    assert opening.rec_seq == sealing.rec_seq == len(records)


def test_rfc8448_ticket_first() -> None:
    """The server's data is record 1: at 0 or 2 it doesn't open, and nothing is counted."""
    for wrong in (0, 2):
        cipher = rfc8448("SERVER_TRAFFIC_SECRET_0", wrong)
        with pytest.raises(InvalidTag):
            cipher.open(SERVER_DATA)
        assert cipher.rec_seq == wrong
    assert rfc8448("SERVER_TRAFFIC_SECRET_0", 1).open(SERVER_DATA) == (23, DATA)


@suites
@given(
    contents=st.lists(
        st.tuples(st.sampled_from(list(RecordType)), st.binary(max_size=300)), max_size=5
    ),
    rec_seq=st.integers(0, (1 << 64) - 6),
)
def test_round_trip(
    version: Version, cipher: Cipher, contents: list[tuple[RecordType, bytes]], rec_seq: int
) -> None:
    info = info_for(version, cipher, rec_seq)
    sender, receiver = RecordCipher(info), RecordCipher(replace(info, iv=info.iv))
    for content_type, content in contents:
        record = sender.seal(content_type, content)
        assert list(split(record)) == [record]
        assert record[0] == (content_type if version is Version.TLS_1_2 else 23)
        assert receiver.open(record) == (content_type, content)
    assert sender.rec_seq == receiver.rec_seq == rec_seq + len(contents)


@suites
@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, MAX_PAYLOAD - 1, MAX_PAYLOAD])
def test_sizes(version: Version, cipher: Cipher, size: int) -> None:
    """The overhead is exactly the explicit nonce, the type byte and the tag."""
    info = info_for(version, cipher)
    record = RecordCipher(info).seal(RecordType.APPLICATION_DATA, bytes(size))
    extra = info.explicit_nonce_size if version is Version.TLS_1_2 else 1
    assert len(record) == HEADER_SIZE + extra + size + cipher.tag_size
    assert RecordCipher(info).open(record) == (RecordType.APPLICATION_DATA, bytes(size))


@pytest.mark.parametrize("cipher", OPENABLE)
@given(
    content=st.binary(max_size=200),
    padding=st.integers(0, 200),
    content_type=st.integers(1, 255),
)
@example(content=b"", padding=0, content_type=21)
@example(content=b"\0\0\0", padding=9, content_type=23)
def test_padding(cipher: Cipher, content: bytes, padding: int, content_type: int) -> None:
    """RFC 8446 section 5.4: zeros after the type are padding, zeros before it are content."""
    info = info_for(Version.TLS_1_3, cipher)
    inner = content + bytes([content_type]) + bytes(padding)
    assert RecordCipher(info).open(sealed13(info, inner)) == (content_type, content)


@pytest.mark.parametrize("inner", [b"", b"\0", bytes(300)])
def test_nothing_but_padding(inner: bytes) -> None:
    """There is no type 0 (RFC 8446 section 5.4): whoever asks can tell."""
    info = info_for(Version.TLS_1_3, Cipher.AES_GCM_128)
    assert RecordCipher(info).open(sealed13(info, inner)) == (0, b"")


def sealed13(info: CryptoInfo, inner: bytes) -> bytes:
    """A TLS 1.3 record with this TLSInnerPlaintext, of the AEAD itself."""
    cipher = RecordCipher(info)
    header = b"\x17\3\3" + (len(inner) + info.cipher.tag_size).to_bytes(2, "big")
    return header + cipher._begin().encrypt(cipher._nonce(b""), inner, header)


@suites
def test_tampering(version: Version, cipher: Cipher) -> None:
    """Any bit of any byte: InvalidTag, nothing is counted, and the true record still opens.

    Of a TLS 1.2 header only the type is tried: version and length are not taken from it, but are
    what they must be (RFC 5246 section 6.2.3.3).
    """
    info = info_for(version, cipher, rec_seq=7)
    receiver = RecordCipher(info)
    record = RecordCipher(info).seal(RecordType.APPLICATION_DATA, b"attack at dawn")
    unchecked = range(1, 5) if version is Version.TLS_1_2 else ()
    for at in range(len(record)):
        for bit in (1, 0x80):
            changed = bytearray(record)
            changed[at] ^= bit
            if at in unchecked:
                continue
            with pytest.raises(InvalidTag):
                receiver.open(bytes(changed))
            assert (receiver.rec_seq, receiver.iv) == (7, info.iv)
    assert receiver.open(record) == (RecordType.APPLICATION_DATA, b"attack at dawn")
    with pytest.raises(InvalidTag):  # a replay
        receiver.open(record)
    assert receiver.rec_seq == 8


@suites
def test_too_short(version: Version, cipher: Cipher) -> None:
    """Less than a tag is no record."""
    info = info_for(version, cipher)
    whole = RecordCipher(info).seal(RecordType.APPLICATION_DATA, b"")
    receiver = RecordCipher(info)
    for size in range(len(whole)):
        with pytest.raises(InvalidTag):
            receiver.open(whole[:size])
    assert receiver.rec_seq == 0


@pytest.mark.parametrize("cipher", [Cipher.AES_GCM_128, Cipher.AES_GCM_256, Cipher.AES_CCM_128])
def test_explicit_nonce(cipher: Cipher) -> None:
    """It is on the wire, counts by itself, wraps at 2^64, and is no function of rec_seq."""
    info = info_for(Version.TLS_1_2, cipher, rec_seq=1000, iv=b"\xff" * 7 + b"\xfe")
    sender, receiver = RecordCipher(info), RecordCipher(replace(info, iv=bytes(8)))
    nonces = []
    for _ in range(3):
        record = sender.seal(RecordType.APPLICATION_DATA, b"x")
        nonces.append(record[HEADER_SIZE : HEADER_SIZE + 8])
        assert receiver.open(record) == (RecordType.APPLICATION_DATA, b"x")
        assert receiver.iv == sender.iv
    assert nonces == [b"\xff" * 7 + b"\xfe", b"\xff" * 8, bytes(8)]
    assert sender.iv == bytes(7) + b"\1"
    assert sender.rec_seq == receiver.rec_seq == 1003


@suites
def test_nonces_never_repeat(version: Version, cipher: Cipher) -> None:
    """The same content sealed twice is two different records."""
    sender = RecordCipher(info_for(version, cipher))
    sealed = {sender.seal(RecordType.APPLICATION_DATA, b"same") for _ in range(50)}
    assert len(sealed) == 50


@pytest.mark.parametrize("cipher", [Cipher.SM4_GCM, Cipher.SM4_CCM])
def test_no_implementation(cipher: Cipher) -> None:
    with pytest.raises(KeyMaterialError, match=cipher.name):
        RecordCipher(info_for(Version.TLS_1_3, cipher))


plausible_records = st.builds(
    lambda kind, minor, body: bytes([kind, 3, minor]) + len(body).to_bytes(2, "big") + body,
    st.integers(20, 24),
    st.integers(0, 4),
    st.binary(max_size=40),
)


@given(records=st.lists(plausible_records, max_size=6), data=st.data())
def test_reader_never_wants_too_much(records: list[bytes], data: st.DataObject) -> None:
    """However the stream is fed, the reader asks for nothing beyond the record it is in."""
    reader = RecordReader()
    for record in records:
        at, got = 0, None
        while got is None:
            assert 1 <= reader.wanted <= len(record) - at
            assert reader.partial == (at > 0)
            size = data.draw(st.integers(1, reader.wanted))
            got = reader.feed(record[at : at + size])
            at += size
        assert got == record
    assert not reader.partial
    assert reader.wanted == HEADER_SIZE


def test_reader_byte_by_byte() -> None:
    stream = SERVER_HELLO + SERVER_FLIGHT + TICKET
    reader = RecordReader()
    found = []
    for at in range(len(stream)):
        record = reader.feed(stream[at : at + 1])
        if record is not None:
            found.append(record)
    assert found == [SERVER_HELLO, SERVER_FLIGHT, TICKET] == list(split(stream))


@pytest.mark.parametrize(
    "header",
    [
        b"GET /",
        b"\x80\x2e\1\3\1",
        b"\x17\2\0\0\5",
        b"\x17\4\0\0\5",
        b"\x17\3\3\xff\xff",
        b"\x17\3\3\x48\x01",
        bytes(5),
        b"\xff" * 5,
    ],
)
def test_implausible_header(header: bytes) -> None:
    """Given at once, rather than waiting for a body that may never come."""
    reader = RecordReader()
    for at in range(4):
        assert reader.feed(header[at : at + 1]) is None
    assert reader.feed(header[4:]) == header
    assert not reader.partial
    assert reader.wanted == HEADER_SIZE


def test_longest_records() -> None:
    """TLS 1.3 allows 2^14 + 256 (RFC 8446 section 5.2); OpenSSL itself judges up to 2^14 + 1024."""
    for longest in (MAX_PAYLOAD + 256, MAX_PAYLOAD + 1024):
        reader = RecordReader()
        assert reader.feed(b"\x17\3\3" + longest.to_bytes(2, "big")) is None
        assert reader.wanted == longest


@given(st.binary(max_size=400), st.data())
def test_reader_takes_garbage(garbage: bytes, data: st.DataObject) -> None:
    """Nothing raises, nothing is lost, and there is always something wanted."""
    reader = RecordReader()
    out, at = b"", 0
    while at < len(garbage):
        size = data.draw(st.integers(1, reader.wanted))
        out += reader.feed(garbage[at : at + size]) or b""
        at += size
    assert garbage.startswith(out)
    assert reader.wanted >= 1


@given(records=st.lists(plausible_records, max_size=6), cut=st.integers(0, 50))
def test_split(records: list[bytes], cut: int) -> None:
    """Whole records come out; of an incomplete one nothing does."""
    stream = b"".join(records)
    kept = stream[: max(0, len(stream) - cut)]
    expected, size = [], 0
    for record in records:
        size += len(record)
        if size <= len(kept):
            expected.append(record)
    assert list(split(kept)) == expected


messages = st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=60)), max_size=6)


@given(messages=messages, data=st.data())
def test_messages(messages: list[tuple[int, bytes]], data: st.DataObject) -> None:
    """Messages come out the same over any split into records, empty ones too."""
    stream = b"".join(
        bytes([kind]) + len(body).to_bytes(3, "big") + body for kind, body in messages
    )
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=10)))
    reader = MessageReader()
    found = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += reader.feed(stream[start:end])
    assert found == messages
    assert not reader.partial


def test_oversize_message() -> None:
    """Refused by its header, before anything of it is stored."""
    limit = 1 << 17
    reader = MessageReader()
    assert reader.feed(b"\x0b" + limit.to_bytes(3, "big")) == []
    assert reader.partial
    with pytest.raises(ValueError, match=str(limit + 1)):
        MessageReader().feed(b"\x0b" + (limit + 1).to_bytes(3, "big"))
