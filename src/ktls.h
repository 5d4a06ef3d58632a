/* SPDX-License-Identifier: MIT */
/*
 * ktls.h - the Linux kernel's TLS record layer (net/tls) for a TCP socket
 *
 * A plain C library without state: every function takes a file descriptor of
 * a connected TCP socket, returns 0 or a count, and -errno on failure; errno
 * itself is never for the caller to read. Nothing here allocates, retries on
 * a timeout or changes O_NONBLOCK. Copies of keys made on the way to the
 * kernel are wiped before a function returns, whatever it returns.
 *
 * The order that works: ktls_attach() (best before the handshake: without
 * keys the socket stays plain TCP), the TLS handshake, ktls_install() for RX,
 * ktls_install() for TX. After TX was accepted every byte written to the
 * socket is a record's payload: there is no way back to plain TCP.
 */
#ifndef KTLS_H
#define KTLS_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Protocol versions as the kernel (and the record header) writes them. */
#define KTLS_VERSION_1_2 0x0303
#define KTLS_VERSION_1_3 0x0304

/* Cipher ids of <linux/tls.h>; the comment names the first kernel release. */
#define KTLS_CIPHER_AES_GCM_128 51       /* 4.13; TLS 1.3 from 5.1 */
#define KTLS_CIPHER_AES_GCM_256 52       /* 5.1 */
#define KTLS_CIPHER_AES_CCM_128 53       /* 5.2 */
#define KTLS_CIPHER_CHACHA20_POLY1305 54 /* 5.11 */
#define KTLS_CIPHER_SM4_GCM 55           /* 5.16, TLS 1.3 */
#define KTLS_CIPHER_SM4_CCM 56           /* 5.16, TLS 1.3 */
#define KTLS_CIPHER_ARIA_GCM_128 57      /* 6.1, TLS 1.2 */
#define KTLS_CIPHER_ARIA_GCM_256 58      /* 6.1, TLS 1.2 */

/* Directions: the socket option names TLS_TX (4.13) and TLS_RX (4.17). */
#define KTLS_TX 1
#define KTLS_RX 2

/* Options, by the names of <linux/tls.h>; the comment says since when. */
#define KTLS_TX_ZEROCOPY_RO 3     /* 5.19, 0 or 1 */
#define KTLS_RX_EXPECT_NO_PAD 4   /* 6.0, 0 or 1 */
#define KTLS_TX_MAX_PAYLOAD_LEN 5 /* in 7.2, not in 6.12; 64 to 16384 */

/* Record content types, RFC 8446 section 5.1; NONE: no record, plain TCP. */
#define KTLS_RECORD_NONE 0
#define KTLS_RECORD_ALERT 21
#define KTLS_RECORD_HANDSHAKE 22
#define KTLS_RECORD_DATA 23

#define KTLS_MAX_KEY 32
#define KTLS_MAX_IV 12
#define KTLS_MAX_SALT 4
#define KTLS_REC_SEQ 8
#define KTLS_MAX_PAYLOAD 16384 /* RFC 8446 section 5.1: 2^14 octets */

/* One row of the cipher table: sizes in bytes, as the kernel wants them. */
struct ktls_cipher {
	const char *name;
	uint16_t id;
	uint16_t info_size; /* of the crypto_info given to setsockopt */
	uint8_t key_size, iv_size, salt_size, tag_size;
	uint8_t key_at, iv_at, salt_at, rec_seq_at; /* offsets in it */
	uint8_t tls12, tls13; /* 1: the kernel takes it in that version */
};

/*
 * One direction's keys. TLS 1.2 AES and ARIA: salt is the 4 byte implicit
 * nonce, iv the 8 byte explicit one of the next record sent. TLS 1.3: salt is
 * the first 4 bytes of the write IV, iv the other 8. ChaCha20-Poly1305: no
 * salt, iv is all 12 bytes. rec_seq is big-endian. Arrays are filled from
 * their start; the cipher's row says how far.
 */
struct ktls_keys {
	uint16_t version;
	uint16_t cipher;
	uint8_t key[KTLS_MAX_KEY];
	uint8_t iv[KTLS_MAX_IV];
	uint8_t salt[KTLS_MAX_SALT];
	uint8_t rec_seq[KTLS_REC_SEQ];
};

/* What ktls_recv_record() found out about the bytes that it returned. */
struct ktls_record {
	uint8_t type; /* KTLS_RECORD_NONE: no record type came with them */
	uint8_t end;  /* 1: they end their record (MSG_EOR) */
};

/* The row of a cipher id, or NULL. */
const struct ktls_cipher *ktls_cipher_by_id(unsigned int id);

/* The row at an index from 0 up, or NULL past the last. */
const struct ktls_cipher *ktls_cipher_at(size_t index);

/* memset(0) that the compiler keeps. */
void ktls_wipe(void *memory, size_t size);

/*
 * Attach the "tls" ULP (setsockopt TCP_ULP, since 4.13). The socket must be
 * ESTABLISHED; it stays plain TCP until keys are installed.
 *   -ENOENT       the tls module is absent, and can't be loaded by this user
 *   -ENOPROTOOPT  not a TCP socket, or TCP without ULPs (MPTCP)
 *   -EOPNOTSUPP   not an internet socket
 *   -ENOTCONN     not ESTABLISHED, for instance after the peer's FIN
 *   -EEXIST       an ULP is there already, perhaps this one
 * A failure leaves the socket as it was.
 */
int ktls_attach(int fd);

/*
 * Give the kernel one direction's keys (setsockopt TLS_TX since 4.13, TLS_RX
 * since 4.17). On kernels that can rekey (6.14) a second call on a TLS 1.3
 * socket replaces the keys. Needs ktls_attach().
 *   -EINVAL       no such direction, the cipher isn't in the table, the kernel
 *                 doesn't know it, or it doesn't go with the version or with
 *                 the other direction's
 *   -ENOENT       the kernel has no implementation of the algorithm
 *   -ENOPROTOOPT  no ULP attached
 *   -EBUSY        there are keys, and they can't be replaced
 * A failure leaves the direction as it was, and can be repeated. After TX
 * succeeded nothing that can fail may run before the caller is told.
 */
int ktls_install(int fd, int direction, const struct ktls_keys *keys);

/*
 * Read one direction's keys back (getsockopt): iv and rec_seq are those of
 * the next record. Anyone who holds the descriptor can do this. The caller
 * wipes *keys, which is all zero after a failure.
 *   -EBUSY       no keys there
 *   -EOPNOTSUPP  no ULP attached
 *   -EPROTO      keys of a cipher that isn't in the table
 *   -EINVAL      no such direction
 */
int ktls_query(int fd, int direction, struct ktls_keys *keys);

/*
 * Which version and cipher a direction's keys are for, without reading the
 * keys. Errors as for ktls_query(), but for -EPROTO.
 */
int ktls_installed(int fd, int direction, uint16_t *version, uint16_t *cipher);

/*
 * Set an option. Needs ktls_attach(), and RX_EXPECT_NO_PAD TLS 1.3 keys for RX.
 *   -ENOPROTOOPT  this kernel has no such option, or no ULP is attached
 *   -EINVAL       a value out of range, or not at this time
 *   -EBUSY        TX_MAX_PAYLOAD_LEN while a record is open
 */
int ktls_set_option(int fd, int option, unsigned int value);

/*
 * Read an option; errors as above, and -EOPNOTSUPP without the ULP. *value is 0
 * after a failure.
 */
int ktls_get_option(int fd, int option, unsigned int *value);

/*
 * sendfile(2) until count bytes went out or the file ended, from offset on;
 * the file's own position is neither used nor moved. count is not bounded by
 * the 0x7ffff000 bytes of one call; UINT64_MAX means up to the end. The file's
 * size counts (fstat(2)), as it is before each call: never ask for bytes beyond
 * it, or at its end the kernel waits, on a non-blocking socket too (6.5). (One
 * that is truncated at that moment can still make it.) With TX keys the payload
 * is encrypted on its way and the last record is closed when the function
 * returns 0, also at the end of a file shorter than count, or with a count of 0.
 *
 * *sent is the number of bytes that went out, on failure too: it is always
 * written. interrupted(context), if not NULL, is asked after every short call
 * and EINTR; its nonzero answer ends the loop and is returned (make it
 * negative). Otherwise EINTR is retried.
 *   -EAGAIN     would block, or SO_SNDTIMEO ran out
 *   -EOVERFLOW  offset is beyond 2^63 - 1; nothing was done
 * Any error leaves the last record open: the next send continues it.
 */
int ktls_sendfile(int fd, int file, uint64_t offset, uint64_t count,
		  uint64_t *sent, int (*interrupted)(void *), void *context);

/*
 * Send one record of a type (sendmsg with a TLS_SET_RECORD_TYPE cmsg, 4.13)
 * and with it, first, whatever MSG_MORE left open. MSG_NOSIGNAL is added to
 * flags. A payload over 16384 bytes would be split by the kernel into records
 * of that type: -EMSGSIZE instead. Returns the bytes taken. Needs TX keys:
 * without them the kernel ignores the type and sends plain bytes.
 */
ssize_t ktls_send_record(int fd, uint8_t type, const void *data, size_t size,
			 int flags);

/*
 * Send a TLS 1.3 KeyUpdate (RFC 8446 section 4.6.3), after all data before it,
 * and install the keys that follow it for sending: in one call, because the
 * peer expects the next key from the record on. request is 0, or 1 to ask the
 * peer for the same. Needs TX keys, and a kernel that can rekey (6.14).
 *
 * Returns -errno if the record was not sent: then nothing has changed. Else 0,
 * and *installed is 0, or the -errno of the new keys: then nothing that is sent
 * can be read by the peer any more.
 */
int ktls_update_key(int fd, const struct ktls_keys *keys, int request,
		    int flags, int *installed);

/*
 * Send out data that MSG_MORE or a short sendfile left in an open record.
 * Nothing goes out when none is open. Needs TX keys.
 */
int ktls_flush(int fd, int flags);

/*
 * Have TCP send what it holds back for more to come. To be called after a send
 * that would block, before waiting for room: net/tls gives a full record to TCP
 * as a part of something bigger, where MSG_MORE or the rest of a sendfile tells
 * it so. If that fills a small SO_SNDBUF, nothing may be on its way whose
 * acknowledgement would make room. ktls_sendfile() calls it by itself. Up to
 * Linux 6.4 net/tls may do so again while the caller waits, if the peer's window
 * is small, too: who waits without an end comes back after a while.
 *
 * With an SO_SNDBUF of 1 MiB or more it does nothing. No record is closed by it.
 * A TCP_CORK is taken off for the moment, whose change by another thread
 * meanwhile may get lost.
 */
int ktls_push(int fd);

/*
 * Receive payload of one type (recvmsg with room for a TLS_GET_RECORD_TYPE
 * cmsg, 4.17). Data records are joined up to size; any other type comes one
 * record a call, over several calls if size is too small (record->end tells).
 * 0 bytes are the end of the stream only with type NONE: a data record may be
 * empty. Bytes with type NONE are plain TCP: RX has no keys.
 * After an error other than -EAGAIN, -EINTR and -EKEYEXPIRED reading is over:
 *   -EPROTO    the ancillary data is not exactly one record type; the bytes
 *              were taken all the same
 *   -EBADMSG   a record that doesn't decrypt (sticky), or is too short
 *   -EMSGSIZE, -EINVAL
 *              a record too long, of a wrong version (reported only once)
 *   -EKEYEXPIRED
 *              a KeyUpdate came, RX waits for the next keys (6.14)
 */
ssize_t ktls_recv_record(int fd, void *buffer, size_t size, int flags,
			 struct ktls_record *record);

/* Where a TCP connection's stream is, in bytes since it began. */
struct ktls_stream {
	uint8_t state;     /* tcpi_state: 1 ESTABLISHED, 7 CLOSE, ... */
	uint64_t acked;    /* acknowledged by the peer */
	uint64_t queued;   /* beyond that: in the send queue, a FIN included */
	uint64_t received; /* read or not */
};

/*
 * Ask TCP where its stream is (TCP_INFO, SIOCOUTQ). acked and queued are those
 * of one moment. Before 4.1 acked and received are 0. Records that wait in the
 * kernel's TLS are not in the queue.
 */
int ktls_get_stream(int fd, struct ktls_stream *stream);

/* What ktls_recvfile() did besides its error. */
struct ktls_received {
	size_t written; /* bytes that are in the file */
	size_t held;    /* bytes in the pipe, which the file didn't take ... */
	int refusal;    /* ... because of this -errno */
};

/*
 * Receive payload of data records into a file, at offset, without a copy
 * through this process: splice(2) from the socket into a pipe, and from there
 * (4.17). It moves what is there now, at most count bytes and as many records
 * as surely fit the pipe, and never waits. pipe has the ends to read and to
 * write of an empty pipe, O_NONBLOCK, of 46 pages (F_SETPIPE_SZ) or many times
 * that; the file must be seekable and not O_APPEND. Needs RX keys.
 *
 * *received is always written. After a refusal of the file the held bytes are
 * for the caller to take out of the pipe: they are gone from the socket.
 *   0        count bytes were moved, or as many records as fit; or, if nothing
 *            was, an empty record (now gone) or the end of the stream follows
 *   -EAGAIN  no more is there now
 *   -EINVAL  a record that isn't data follows (ktls_recv_record() takes it), or
 *            one of a wrong version (it has nothing to take: this was all)
 *   -ENOBUFS the pipe is too small for a record
 *   others   as ktls_recv_record() has them, and reported only once, too
 */
int ktls_recvfile(int fd, const int pipe[2], int file, uint64_t offset,
		  size_t count, struct ktls_received *received);

#ifdef __cplusplus
}
#endif

#endif
