// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64

#include "ktls.h"

#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stddef.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

/*
 * The kernel's numbers, for headers that are old or absent. <linux/tls.h> is
 * not read: its structs and ours would have to agree anyway, and the asserts
 * below hold ours to the ABI.
 */
#ifndef TCP_ULP
#define TCP_ULP 31
#endif
#ifndef SOL_TLS
#define SOL_TLS 282
#endif
#define TLS_SET_RECORD_TYPE 1
#define TLS_GET_RECORD_TYPE 2

_Static_assert(TCP_ULP == 31, "uapi linux/tcp.h");
_Static_assert(SOL_TLS == 282, "linux/socket.h");

/*
 * The crypto_info structs of <linux/tls.h>. Its eight have three layouts,
 * which are ABI: they never change, new ciphers get new ids.
 */
struct info_128 { /* AES-GCM-128, AES-CCM-128, SM4-GCM, SM4-CCM, ARIA-GCM-128 */
	uint16_t version, cipher;
	uint8_t iv[8], key[16], salt[4], rec_seq[KTLS_REC_SEQ];
};

struct info_256 { /* AES-GCM-256, ARIA-GCM-256 */
	uint16_t version, cipher;
	uint8_t iv[8], key[32], salt[4], rec_seq[KTLS_REC_SEQ];
};

struct info_chacha { /* CHACHA20-POLY1305; its salt has no bytes, at 48 */
	uint16_t version, cipher;
	uint8_t iv[12], key[32], rec_seq[KTLS_REC_SEQ];
};

union info {
	struct info_128 gcm_128;
	struct info_256 gcm_256;
	struct info_chacha chacha;
	uint8_t bytes[sizeof(struct info_256)];
};

#define AT(layout, field, offset)                                              \
	_Static_assert(offsetof(struct layout, field) == (offset),             \
		       "ABI: offset of " #field " in " #layout)

AT(info_128, version, 0);
AT(info_128, cipher, 2);
AT(info_128, iv, 4);
AT(info_128, key, 12);
AT(info_128, salt, 28);
AT(info_128, rec_seq, 32);
_Static_assert(sizeof(struct info_128) == 40, "ABI: size of info_128");

AT(info_256, version, 0);
AT(info_256, cipher, 2);
AT(info_256, iv, 4);
AT(info_256, key, 12);
AT(info_256, salt, 44);
AT(info_256, rec_seq, 48);
_Static_assert(sizeof(struct info_256) == 56, "ABI: size of info_256");

AT(info_chacha, version, 0);
AT(info_chacha, cipher, 2);
AT(info_chacha, iv, 4);
AT(info_chacha, key, 16);
AT(info_chacha, rec_seq, 48);
_Static_assert(sizeof(struct info_chacha) == 56, "ABI: size of info_chacha");

#define SIZE_OF(layout, field) sizeof(((struct layout *)0)->field)

#define ROW(cipher_name, cipher_id, layout, salt_bytes, salt_offset, v12, v13) \
	{                                                                      \
		.name = cipher_name,                                           \
		.id = cipher_id,                                               \
		.info_size = sizeof(struct layout),                            \
		.key_size = SIZE_OF(layout, key),                              \
		.iv_size = SIZE_OF(layout, iv),                                \
		.salt_size = salt_bytes,                                       \
		.tag_size = 16,                                                \
		.key_at = offsetof(struct layout, key),                        \
		.iv_at = offsetof(struct layout, iv),                          \
		.salt_at = salt_offset,                                        \
		.rec_seq_at = offsetof(struct layout, rec_seq),                \
		.tls12 = v12,                                                  \
		.tls13 = v13,                                                  \
	}
#define SALTED(name, id, layout, v12, v13)                                     \
	ROW(name, id, layout, SIZE_OF(layout, salt),                           \
	    offsetof(struct layout, salt), v12, v13)

static const struct ktls_cipher ciphers[] = {
	SALTED("AES_GCM_128", KTLS_CIPHER_AES_GCM_128, info_128, 1, 1),
	SALTED("AES_GCM_256", KTLS_CIPHER_AES_GCM_256, info_256, 1, 1),
	SALTED("AES_CCM_128", KTLS_CIPHER_AES_CCM_128, info_128, 1, 1),
	ROW("CHACHA20_POLY1305", KTLS_CIPHER_CHACHA20_POLY1305, info_chacha, 0,
	    offsetof(struct info_chacha, rec_seq), 1, 1),
	SALTED("SM4_GCM", KTLS_CIPHER_SM4_GCM, info_128, 0, 1),
	SALTED("SM4_CCM", KTLS_CIPHER_SM4_CCM, info_128, 0, 1),
	SALTED("ARIA_GCM_128", KTLS_CIPHER_ARIA_GCM_128, info_128, 1, 0),
	SALTED("ARIA_GCM_256", KTLS_CIPHER_ARIA_GCM_256, info_256, 1, 0),
};

const struct ktls_cipher *ktls_cipher_at(size_t index)
{
	if (index >= sizeof(ciphers) / sizeof(ciphers[0]))
		return NULL;
	return &ciphers[index];
}

const struct ktls_cipher *ktls_cipher_by_id(unsigned int id)
{
	const struct ktls_cipher *row;

	for (size_t i = 0; (row = ktls_cipher_at(i)); i++)
		if (row->id == id)
			return row;
	return NULL;
}

void ktls_wipe(void *memory, size_t size)
{
	explicit_bzero(memory, size);
}

int ktls_attach(int fd)
{
	if (setsockopt(fd, IPPROTO_TCP, TCP_ULP, "tls", sizeof("tls")))
		return -errno;
	return 0;
}

static void pack(const struct ktls_cipher *row, const struct ktls_keys *keys,
		 union info *info)
{
	memset(info, 0, sizeof(*info));
	/* All three layouts begin with these two, in host order. */
	info->gcm_128.version = keys->version;
	info->gcm_128.cipher = keys->cipher;
	memcpy(info->bytes + row->iv_at, keys->iv, row->iv_size);
	memcpy(info->bytes + row->key_at, keys->key, row->key_size);
	memcpy(info->bytes + row->salt_at, keys->salt, row->salt_size);
	memcpy(info->bytes + row->rec_seq_at, keys->rec_seq, KTLS_REC_SEQ);
}

static void unpack(const struct ktls_cipher *row, const union info *info,
		   struct ktls_keys *keys)
{
	keys->version = info->gcm_128.version;
	keys->cipher = info->gcm_128.cipher;
	memcpy(keys->iv, info->bytes + row->iv_at, row->iv_size);
	memcpy(keys->key, info->bytes + row->key_at, row->key_size);
	memcpy(keys->salt, info->bytes + row->salt_at, row->salt_size);
	memcpy(keys->rec_seq, info->bytes + row->rec_seq_at, KTLS_REC_SEQ);
}

static int valid(const struct ktls_cipher *row, int direction, int version)
{
	if (!row || (direction != KTLS_TX && direction != KTLS_RX))
		return 0;
	return (version == KTLS_VERSION_1_2 && row->tls12) ||
	       (version == KTLS_VERSION_1_3 && row->tls13);
}

int ktls_install(int fd, int direction, const struct ktls_keys *keys)
{
	const struct ktls_cipher *row = ktls_cipher_by_id(keys->cipher);
	union info info;
	int error = 0;

	if (!valid(row, direction, keys->version))
		return -EINVAL;
	pack(row, keys, &info);
	if (setsockopt(fd, SOL_TLS, direction, &info, row->info_size))
		error = -errno;
	ktls_wipe(&info, sizeof(info));
	return error;
}

int ktls_installed(int fd, int direction, uint16_t *version, uint16_t *cipher)
{
	/* The length picks the answer: 4 bytes are version and cipher only. */
	uint16_t found[2] = { 0, 0 };
	socklen_t size = sizeof(found);

	*version = *cipher = 0;
	if (direction != KTLS_TX && direction != KTLS_RX)
		return -EINVAL;
	if (getsockopt(fd, SOL_TLS, direction, found, &size))
		return -errno;
	*version = found[0];
	*cipher = found[1];
	return 0;
}

static int query(int fd, int direction, union info *info,
		 const struct ktls_cipher **row)
{
	uint16_t version, cipher;
	int error = ktls_installed(fd, direction, &version, &cipher);
	socklen_t size;

	if (error)
		return error;
	*row = ktls_cipher_by_id(cipher);
	if (!*row)
		return -EPROTO;
	size = (*row)->info_size;
	if (getsockopt(fd, SOL_TLS, direction, info, &size))
		return -errno;
	return 0;
}

int ktls_query(int fd, int direction, struct ktls_keys *keys)
{
	const struct ktls_cipher *row = NULL;
	union info info = { 0 };
	int error = query(fd, direction, &info, &row);

	memset(keys, 0, sizeof(*keys));
	if (!error)
		unpack(row, &info, keys);
	ktls_wipe(&info, sizeof(info));
	return error;
}

int ktls_set_option(int fd, int option, unsigned int value)
{
	/* The payload length is a u16 to the kernel, the others are ints. */
	uint16_t small = (uint16_t)value;
	int is_small = option == KTLS_TX_MAX_PAYLOAD_LEN;

	if (is_small && value > UINT16_MAX)
		return -EINVAL;
	if (setsockopt(fd, SOL_TLS, option,
		       is_small ? (void *)&small : (void *)&value,
		       is_small ? sizeof(small) : sizeof(value)))
		return -errno;
	return 0;
}

int ktls_get_option(int fd, int option, unsigned int *value)
{
	uint16_t small = 0;
	unsigned int whole = 0;
	int is_small = option == KTLS_TX_MAX_PAYLOAD_LEN;
	socklen_t size = is_small ? sizeof(small) : sizeof(whole);

	*value = 0;
	if (getsockopt(fd, SOL_TLS, option,
		       is_small ? (void *)&small : (void *)&whole, &size))
		return -errno;
	*value = is_small ? small : whole;
	return 0;
}

/* The beginning of struct tcp_info (<linux/tcp.h>), which only ever grows. */
struct tcp_begin {
	uint8_t state, others[119];
	uint64_t bytes_acked, bytes_received; /* since 4.1 */
};

_Static_assert(offsetof(struct tcp_begin, bytes_acked) == 120,
	       "uapi linux/tcp.h");

static int tcp_begin(int fd, struct tcp_begin *info)
{
	socklen_t size = sizeof(*info);

	memset(info, 0, sizeof(*info));
	return getsockopt(fd, IPPROTO_TCP, TCP_INFO, info, &size) ? -errno : 0;
}

int ktls_get_stream(int fd, struct ktls_stream *stream)
{
	struct tcp_begin before, after;
	int error, queued;

	memset(stream, 0, sizeof(*stream));
	do {
		error = tcp_begin(fd, &before);
		if (error)
			return error;
		if (ioctl(fd, TIOCOUTQ, &queued)) /* that is SIOCOUTQ */
			return -errno;
		error = tcp_begin(fd, &after);
		if (error)
			return error;
	} while (after.bytes_acked != before.bytes_acked);
	stream->state = after.state;
	stream->acked = after.bytes_acked;
	stream->queued = (uint64_t)queued;
	stream->received = after.bytes_received;
	return 0;
}

/* What Linux moves in one read, write or sendfile: MAX_RW_COUNT. */
#define MAX_ONE_CALL 0x7ffff000u

/*
 * fstat(2) by its own system call, where the kernel's struct is the C library's.
 * In glibc (2.33 and later) fstat() is newfstatat() of an empty path, which
 * takes Linux 6.1 five times as many instructions; 7.3 as many.
 */
static int stat_of(int file, struct stat *info)
{
#if defined(SYS_fstat) && defined(__LP64__) &&                                 \
	(defined(__x86_64__) || defined(__aarch64__))
	if (!syscall(SYS_fstat, file, info))
		return 0;
	if (errno != ENOSYS && errno != EPERM) /* a sandbox's filter */
		return -1;
#endif
	return fstat(file, info);
}

/*
 * How much of count the file has from offset on. Asked for more, Linux 6.5 and
 * later find the file's end, close the open record there (tls_sw_splice_eof())
 * and wait for room to send it, O_NONBLOCK or not.
 */
static int left_in(int file, uint64_t offset, uint64_t count, uint64_t *left)
{
	struct stat info;

	*left = 0;
	if (stat_of(file, &info))
		return -errno;
	*left = (uint64_t)info.st_size > offset
			? (uint64_t)info.st_size - offset
			: 0;
	if (*left > count)
		*left = count;
	return 0;
}

/* All of ktls_sendfile() but for what -EAGAIN takes. */
static int send_file(int fd, int file, uint64_t offset, uint64_t count,
		     uint64_t *sent, int (*interrupted)(void *), void *context)
{
	for (;;) {
		off_t at = (off_t)(offset + *sent);
		uint64_t left;
		size_t chunk;
		ssize_t n;
		int stop;

		stop = left_in(file, offset + *sent, count - *sent, &left);
		if (stop)
			return stop;
		chunk = left < MAX_ONE_CALL ? left : MAX_ONE_CALL;
		n = chunk ? sendfile(fd, file, &at, chunk) : 0;
		if (n == 0) {
			/* Nothing left: a record may be open since before. */
			n = ktls_flush(fd, 0);
			if (n != -EINTR)
				return (int)n;
		} else if (n < 0 && errno != EINTR) {
			return -errno;
		} else if (n > 0) {
			*sent += (uint64_t)n;
			if ((uint64_t)n == left)
				return 0;
		}
		if (n < 0 || (size_t)n < chunk) {
			/* Short: a signal, a full socket, a file cut short. */
			stop = interrupted ? interrupted(context) : 0;
			if (stop)
				return stop;
		}
	}
}

int ktls_sendfile(int fd, int file, uint64_t offset, uint64_t count,
		  uint64_t *sent, int (*interrupted)(void *), void *context)
{
	int error;

	*sent = 0;
	if (offset > INT64_MAX)
		return -EOVERFLOW;
	error = send_file(fd, file, offset, count, sent, interrupted, context);
	if (error == -EAGAIN)
		ktls_push(fd);
	return error;
}

/* Many times a record, and what TCP makes of it: a packet, however big. */
#define BIG_BUFFER (1 << 20)

int ktls_push(int fd)
{
	int buffer, corked, off = 0;
	socklen_t size = sizeof(int);

	if (getsockopt(fd, SOL_SOCKET, SO_SNDBUF, &buffer, &size))
		return -errno;
	/* What fills this is on its way but for a packet, and makes room. */
	if (buffer >= BIG_BUFFER)
		return 0;
	/*
	 * Up to Linux 6.4 the pages of a sendfile come with
	 * MSG_SENDPAGE_NOTLAST, and tls_push_sg() gives it on, for the last of
	 * a record too: do_tcp_sendpages() doesn't call tcp_push() then, nor
	 * does tls_sw_sendpage(), which finds no memory for the next record and
	 * returns. Later, and with MSG_MORE, tcp_push() arms a timer of 200 ms.
	 * tcp_sendmsg() does push what is corked before it waits: so does this,
	 * by __tcp_sock_set_cork(), which calls tcp_push_pending_frames().
	 */
	if (getsockopt(fd, IPPROTO_TCP, TCP_CORK, &corked, &size) ||
	    setsockopt(fd, IPPROTO_TCP, TCP_CORK, &off, sizeof(off)) ||
	    (corked && setsockopt(fd, IPPROTO_TCP, TCP_CORK, &corked, size)))
		return -errno;
	return 0;
}

/* One record type: the only ancillary data that kernel TLS knows. */
union type_cmsg {
	struct cmsghdr header;
	uint8_t bytes[CMSG_SPACE(sizeof(uint8_t))];
};

_Static_assert(sizeof(union type_cmsg) >= 24 || sizeof(void *) == 4,
	       "the kernel keeps a record back when 24 bytes are not there");

ssize_t ktls_send_record(int fd, uint8_t type, const void *data, size_t size,
			 int flags)
{
	struct iovec iov = { .iov_base = (void *)data, .iov_len = size };
	union type_cmsg cmsg = { .bytes = { 0 } };
	struct msghdr msg = {
		.msg_iov = &iov,
		.msg_iovlen = 1,
		.msg_control = &cmsg,
		.msg_controllen = sizeof(cmsg),
	};
	ssize_t n;

	if (size > KTLS_MAX_PAYLOAD)
		return -EMSGSIZE;
	cmsg.header.cmsg_len = CMSG_LEN(sizeof(type));
	cmsg.header.cmsg_level = SOL_TLS;
	cmsg.header.cmsg_type = TLS_SET_RECORD_TYPE;
	*CMSG_DATA(&cmsg.header) = type;
	n = sendmsg(fd, &msg, flags | MSG_NOSIGNAL);
	return n < 0 ? -errno : n;
}

int ktls_update_key(int fd, const struct ktls_keys *keys, int request,
		    int flags, int *installed)
{
	/* key_update, a length of 24 bits, update_requested or not. */
	const uint8_t message[] = { 24, 0, 0, 1, request ? 1 : 0 };
	ssize_t n = ktls_send_record(fd, KTLS_RECORD_HANDSHAKE, message,
				     sizeof(message), flags);

	*installed = 0;
	if (n < 0)
		return (int)n;
	*installed =
		n == sizeof(message) ? ktls_install(fd, KTLS_TX, keys) : -EIO;
	return 0;
}

int ktls_flush(int fd, int flags)
{
	/* An empty record is never sent, but the request closes an open one. */
	ssize_t n = ktls_send_record(fd, KTLS_RECORD_DATA, "", 0, flags);

	return n < 0 ? (int)n : 0;
}

/* The record type of a received message; distrusts all that came with it. */
static int record_type(struct msghdr *msg, uint8_t *type)
{
	struct cmsghdr *cmsg = CMSG_FIRSTHDR(msg);

	*type = KTLS_RECORD_NONE;
	if (msg->msg_flags & MSG_CTRUNC)
		return -EPROTO;
	if (!cmsg)
		return 0;
	if (cmsg->cmsg_level != SOL_TLS ||
	    cmsg->cmsg_type != TLS_GET_RECORD_TYPE ||
	    cmsg->cmsg_len != CMSG_LEN(sizeof(*type)))
		return -EPROTO;
	*type = *CMSG_DATA(cmsg);
	return 0;
}

ssize_t ktls_recv_record(int fd, void *buffer, size_t size, int flags,
			 struct ktls_record *record)
{
	struct iovec iov = { .iov_base = buffer, .iov_len = size };
	union type_cmsg cmsg = { .bytes = { 0 } };
	struct msghdr msg = {
		.msg_iov = &iov,
		.msg_iovlen = 1,
		.msg_control = &cmsg,
		.msg_controllen = sizeof(cmsg),
	};
	ssize_t n;
	int error;

	memset(record, 0, sizeof(*record));
	n = recvmsg(fd, &msg, flags);
	if (n < 0)
		return -errno;
	error = record_type(&msg, &record->type);
	if (error)
		return error;
	record->end = !!(msg.msg_flags & MSG_EOR);
	return n;
}

/*
 * Most pieces that a record can come in, one a pipe slot: MAX_SKB_FRAGS (at
 * most 45) and a linear part. Up to 6.1.190 and its like, tls_sw_splice_read()
 * counts pieces that find no slot as delivered: so each record gets its room.
 */
#define MOST_PIECES 46

/* How many records surely fit into an empty pipe. */
static int records_in(int pipe)
{
	int size = fcntl(pipe, F_GETPIPE_SZ);

	return size < 0 ? -errno : (int)(size / getpagesize() / MOST_PIECES);
}

/* Fill the pipe from the socket; what ended it before count is returned. */
static int fill(int fd, int pipe, size_t count, size_t *filled)
{
	int records = records_in(pipe);

	if (records <= 0)
		return records ? records : -ENOBUFS;
	while (*filled < count && records > 0) {
		ssize_t n = splice(fd, NULL, pipe, NULL, count - *filled,
				   SPLICE_F_NONBLOCK | SPLICE_F_MOVE);

		if (n < 0 && errno != EINTR)
			return -errno;
		if (n == 0)
			return 0;
		if (n > 0) {
			*filled += (size_t)n;
			records--;
		}
	}
	return 0;
}

/* Empty the pipe into the file, as far as the file takes it. */
static void drain(int pipe, int file, uint64_t offset,
		  struct ktls_received *received)
{
	while (received->held) {
		loff_t at = (loff_t)(offset + received->written);
		ssize_t n = splice(pipe, NULL, file, &at, received->held,
				   SPLICE_F_MOVE);

		if (n > 0) {
			received->written += (size_t)n;
			received->held -= (size_t)n;
		} else if (n == 0 || errno != EINTR) {
			received->refusal = n ? -errno : -EIO;
			return;
		}
	}
}

int ktls_recvfile(int fd, const int pipe[2], int file, uint64_t offset,
		  size_t count, struct ktls_received *received)
{
	int error;

	memset(received, 0, sizeof(*received));
	if (offset > INT64_MAX)
		return -EOVERFLOW;
	error = fill(fd, pipe[1], count, &received->held);
	drain(pipe[0], file, offset, received);
	return error;
}
