// SPDX-License-Identifier: MIT
/*
 * ktls_test.c - tests of src/ktls.c that need no kernel TLS
 *
 * The linker turns the core's system calls into the fakes below (--wrap). A
 * test first writes the script, one EXPECT per call with all that the core
 * must pass and what the "kernel" answers, then calls the core. A call that
 * isn't in the script fails the test, and so does one that never came.
 *
 *	cc -std=gnu11 -U_FORTIFY_SOURCE -Isrc -o ktls_test \
 *		tests/ktls_test.c src/ktls.c -Wl,--wrap=setsockopt \
 *		-Wl,--wrap=getsockopt -Wl,--wrap=sendmsg -Wl,--wrap=recvmsg \
 *		-Wl,--wrap=sendfile64 -Wl,--wrap=fstat64 -Wl,--wrap=syscall \
 *		-Wl,--wrap=splice -Wl,--wrap=fcntl64 -Wl,--wrap=ioctl \
 *		-Wl,--wrap=explicit_bzero
 *
 * (_FORTIFY_SOURCE would rename explicit_bzero.) Prints TAP; exits 1 if a
 * test failed. tests/test_core.py builds and runs it with sanitizers.
 */
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64

#include "ktls.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/stat.h>
#include <unistd.h>
#ifdef __has_include
#if __has_include(<linux/tls.h>)
#include <linux/tls.h>
#endif
#endif

/* The kernel's numbers once more: the core's own are what is tested. */
enum { LEVEL_TCP = 6, LEVEL_TLS = 282, ULP = 31, CORK = 3, TX = 1, RX = 2 };
enum { LEVEL_SOCKET = 1, SNDBUF = 7 };
enum { INFO = 11, OUTQ = 0x5411 };
enum { ZEROCOPY_RO = 3, EXPECT_NO_PAD = 4, MAX_PAYLOAD_LEN = 5 };
enum { SET_RECORD_TYPE = 1, GET_RECORD_TYPE = 2, ONE_CALL = 0x7ffff000 };
enum { SOCKET = 1234567, FILE_IN = 7654321 }; /* never open: nothing leaks */
enum { PIPE_OUT = 2345678, PIPE_IN = 8765432 };

#define SIZE(array) (sizeof(array) / sizeof((array)[0]))

/* ---- Checks ---- */

static int failures; /* of the running test */

static void fail(int line, const char *what)
{
	printf("# %s:%d: %s\n", __FILE__, line, what);
	failures++;
}

static void equal(long long got, long long want, const char *what, int line)
{
	if (got == want)
		return;
	fail(line, what);
	printf("#\tis %lld (%#llx), not %lld (%#llx)\n", got, got, want, want);
}

#define CHECK(e) ((e) ? (void)0 : fail(__LINE__, #e))
#define EQUAL(got, want)                                                       \
	equal((long long)(got), (long long)(want), #got, __LINE__)

static int same(const void *a, const void *b, size_t size)
{
	return size == 0 || !memcmp(a, b, size);
}

static int zero(const void *memory, size_t size)
{
	const uint8_t *bytes = memory;

	while (size && !bytes[size - 1])
		size--;
	return size == 0;
}

/* ---- The script, and the fakes that hold the core to it ---- */

enum kind {
	NOTHING,
	SETSOCKOPT,
	GETSOCKOPT,
	SENDMSG,
	RECVMSG,
	SENDFILE64,
	FSTAT64,
	FCNTL64,
	IOCTL,
	SPLICE_IN, /* from the socket into the pipe */
	SPLICE_OUT /* from the pipe into the file */
};

struct call {
	enum kind kind;
	int line;                 /* of its EXPECT */
	int level, option, flags; /* what the core must pass, up to size */
	uint64_t offset;
	size_t size;       /* of the option, the payload, the room for it */
	const void *bytes; /* what the core must pass, or what it gets */
	uint8_t type;
	ssize_t result; /* or -errno; a file's size */
	int msg_flags, cmsg_level, cmsg_type;
	size_t cmsg_len; /* 0: no ancillary data */
};

static struct call script[12];
static size_t scripted, done;
static int failures_before; /* the running call */

static const uint8_t *secret; /* keys the kernel was shown; NULL once wiped */
static size_t secret_size;

#define EXPECT(...)                                                            \
	expect((struct call){ .line = __LINE__, .kind = __VA_ARGS__ })

static void expect(struct call call)
{
	if (scripted == SIZE(script))
		abort();
	script[scripted++] = call;
}

static const struct call *next(int fd, struct call got)
{
	static const struct call none = { .result = -ENOSYS };
	const struct call *call = done < scripted ? &script[done++] : &none;

	failures_before = failures;
	EQUAL(fd, SOCKET);
	EQUAL(got.kind, call->kind);
	EQUAL(got.level, call->level);
	EQUAL(got.option, call->option);
	EQUAL(got.flags, call->flags);
	EQUAL(got.offset, call->offset);
	EQUAL(got.size, call->size);
	return failures > failures_before ? &none : call;
}

static ssize_t answer(const struct call *call)
{
	if (failures > failures_before && done)
		fail(script[done - 1].line, "(in the call expected here)");
	/* After a success errno is nobody's business: leave a trap there. */
	errno = call->result < 0 ? (int)-call->result : ENOTBLK;
	return call->result < 0 ? -1 : call->result;
}

/* At the end of a test, or of a part of one: all done, and all wiped? */
static void finish(void)
{
	if (done < scripted)
		fail(script[done].line, "this call never came");
	CHECK(!secret);
	scripted = done = 0;
	secret = NULL;
}

static void saw_secret(int level, int option, const void *value, size_t size)
{
	/* Version and cipher alone, or an option, are no secret. */
	if (level != LEVEL_TLS || (option != TX && option != RX) ||
	    size <= 2 * sizeof(uint16_t))
		return;
	CHECK(!secret || secret == value);
	secret = value;
	secret_size = size;
}

int __wrap_setsockopt(int fd, int level, int option, const void *value,
		      socklen_t size)
{
	const struct call *call =
		next(fd, (struct call){ SETSOCKOPT, .level = level,
					.option = option, .size = size });

	CHECK(same(value, call->bytes, call->size));
	saw_secret(level, option, value, size);
	return (int)answer(call);
}

int __wrap_getsockopt(int fd, int level, int option, void *value,
		      socklen_t *size)
{
	const struct call *call =
		next(fd, (struct call){ GETSOCKOPT, .level = level,
					.option = option, .size = *size });

	/* A call that fails may have written something all the same. */
	if (call->bytes) {
		memcpy(value, call->bytes, call->size);
		saw_secret(level, option, value, call->size);
	}
	return (int)answer(call);
}

void __real_explicit_bzero(void *memory, size_t size);

void __wrap_explicit_bzero(void *memory, size_t size)
{
	const uint8_t *from = memory;

	__real_explicit_bzero(memory, size);
	if (secret && from <= secret && secret + secret_size <= from + size)
		secret = NULL;
}

static const struct call *next_message(int fd, enum kind kind,
				       const struct msghdr *msg, int flags)
{
	CHECK(!msg->msg_name && !msg->msg_namelen && msg->msg_iovlen == 1);
	return next(fd, (struct call){ kind, .flags = flags,
				       .size = msg->msg_iov->iov_len });
}

ssize_t __wrap_sendmsg(int fd, const struct msghdr *msg, int flags)
{
	const struct call *call = next_message(fd, SENDMSG, msg, flags);
	struct msghdr copy = *msg;
	struct cmsghdr *cmsg = CMSG_FIRSTHDR(&copy);

	CHECK(same(msg->msg_iov->iov_base, call->bytes, call->size));
	CHECK(cmsg && !CMSG_NXTHDR(&copy, cmsg));
	if (cmsg) {
		EQUAL(cmsg->cmsg_level, LEVEL_TLS);
		EQUAL(cmsg->cmsg_type, SET_RECORD_TYPE);
		EQUAL(cmsg->cmsg_len, CMSG_LEN(1));
		EQUAL(*CMSG_DATA(cmsg), call->type);
	}
	return answer(call);
}

ssize_t __wrap_recvmsg(int fd, struct msghdr *msg, int flags)
{
	const struct call *call = next_message(fd, RECVMSG, msg, flags);
	struct cmsghdr *cmsg = CMSG_FIRSTHDR(msg);

	CHECK(cmsg && msg->msg_controllen >= CMSG_SPACE(1));
	if (call->result < 0 || failures > failures_before)
		return answer(call);
	memcpy(msg->msg_iov->iov_base, call->bytes, (size_t)call->result);
	msg->msg_flags = call->msg_flags;
	msg->msg_controllen = call->cmsg_len ? CMSG_SPACE(1) : 0;
	cmsg->cmsg_level = call->cmsg_level;
	cmsg->cmsg_type = call->cmsg_type;
	cmsg->cmsg_len = call->cmsg_len;
	*CMSG_DATA(cmsg) = call->type;
	return answer(call);
}

ssize_t __wrap_sendfile64(int fd, int file, off_t *offset, size_t count)
{
	const struct call *call =
		next(fd, (struct call){ SENDFILE64, .offset = (uint64_t)*offset,
					.size = count });

	EQUAL(file, FILE_IN);
	*offset += call->result < 0 ? 0 : call->result;
	return answer(call);
}

int __wrap_fstat64(int file, struct stat *info)
{
	const struct call *call =
		next(SOCKET, (struct call){ .kind = FSTAT64 });

	EQUAL(file, FILE_IN);
	info->st_size = (off_t)call->result;
	return answer(call) < 0 ? -1 : 0;
}

/* The only one that the core makes by its number. */
long __wrap_syscall(long number, int file, struct stat *info)
{
	EQUAL(number, SYS_fstat);
	return __wrap_fstat64(file, info);
}

ssize_t __wrap_splice(int from, loff_t *from_at, int to, loff_t *to_at,
		      size_t size, unsigned int flags)
{
	int in = from == SOCKET;
	struct call got = { in ? SPLICE_IN : SPLICE_OUT, .size = size,
			    .offset = to_at ? (uint64_t)*to_at : 0 };
	const struct call *call = next(SOCKET, got);

	CHECK(!from_at && (to_at == NULL) == in);
	EQUAL(from, in ? SOCKET : PIPE_OUT);
	EQUAL(to, in ? PIPE_IN : FILE_IN);
	/* Reading from the socket must not wait; writing to the file may. */
	EQUAL(!!(flags & SPLICE_F_NONBLOCK), in);
	return answer(call);
}

int __wrap_fcntl64(int fd, int command, ...)
{
	const struct call *call =
		next(SOCKET, (struct call){ FCNTL64, .option = command });

	EQUAL(fd, PIPE_IN);
	return (int)answer(call);
}

int __wrap_ioctl(int fd, unsigned long request, int *value)
{
	const struct call *call =
		next(fd, (struct call){ IOCTL, .option = (int)request });

	*value = (int)call->result;
	return answer(call) < 0 ? -1 : 0;
}

/* ---- The cipher table ---- */

static const struct ktls_cipher facts[] = {
	/*
	 * By hand from <linux/tls.h> of Linux 6.1. Sizes: crypto_info, key,
	 * iv, salt, tag. Offsets: key, iv, salt, rec_seq. TLS 1.2? TLS 1.3?
	 */
	{ "AES_GCM_128", 51, 40, 16, 8, 4, 16, 12, 4, 28, 32, 1, 1 },
	{ "AES_GCM_256", 52, 56, 32, 8, 4, 16, 12, 4, 44, 48, 1, 1 },
	{ "AES_CCM_128", 53, 40, 16, 8, 4, 16, 12, 4, 28, 32, 1, 1 },
	{ "CHACHA20_POLY1305", 54, 56, 32, 12, 0, 16, 16, 4, 48, 48, 1, 1 },
	{ "SM4_GCM", 55, 40, 16, 8, 4, 16, 12, 4, 28, 32, 0, 1 },
	{ "SM4_CCM", 56, 40, 16, 8, 4, 16, 12, 4, 28, 32, 0, 1 },
	{ "ARIA_GCM_128", 57, 40, 16, 8, 4, 16, 12, 4, 28, 32, 1, 0 },
	{ "ARIA_GCM_256", 58, 56, 32, 8, 4, 16, 12, 4, 44, 48, 1, 0 },
};

#define AGREE(e) _Static_assert(e, "<linux/tls.h> and this file disagree")
#define FIELD_AT(name, field) offsetof(struct tls12_crypto_info_##name, field)
#define AGREE_ON(NAME, name, key_at, salt_at, rec_seq_at, size)                \
	AGREE(TLS_CIPHER_##NAME == KTLS_CIPHER_##NAME &&                       \
	      TLS_CIPHER_##NAME##_TAG_SIZE == 16 && FIELD_AT(name, iv) == 4 && \
	      FIELD_AT(name, key) == key_at &&                                 \
	      FIELD_AT(name, salt) == salt_at &&                               \
	      FIELD_AT(name, rec_seq) == rec_seq_at &&                         \
	      sizeof(struct tls12_crypto_info_##name) == size)

#ifdef TLS_CIPHER_AES_GCM_128
AGREE_ON(AES_GCM_128, aes_gcm_128, 12, 28, 32, 40);
AGREE(TLS_TX == TX && TLS_SET_RECORD_TYPE == SET_RECORD_TYPE);
AGREE(TLS_1_2_VERSION == KTLS_VERSION_1_2);
AGREE(offsetof(struct tls_crypto_info, cipher_type) == 2);
#endif
#ifdef TLS_CIPHER_AES_GCM_256 /* TLS_RX and TLS 1.3 are no younger */
AGREE_ON(AES_GCM_256, aes_gcm_256, 12, 44, 48, 56);
AGREE(TLS_RX == RX && TLS_GET_RECORD_TYPE == GET_RECORD_TYPE);
AGREE(TLS_1_3_VERSION == KTLS_VERSION_1_3);
#endif
#ifdef TLS_TX_ZEROCOPY_RO
AGREE(TLS_TX_ZEROCOPY_RO == ZEROCOPY_RO);
#endif
#ifdef TLS_RX_EXPECT_NO_PAD
AGREE(TLS_RX_EXPECT_NO_PAD == EXPECT_NO_PAD);
#endif
#ifdef TLS_TX_MAX_PAYLOAD_LEN
AGREE(TLS_TX_MAX_PAYLOAD_LEN == MAX_PAYLOAD_LEN);
#endif
#ifdef TLS_CIPHER_AES_CCM_128
AGREE_ON(AES_CCM_128, aes_ccm_128, 12, 28, 32, 40);
#endif
#ifdef TLS_CIPHER_CHACHA20_POLY1305
AGREE_ON(CHACHA20_POLY1305, chacha20_poly1305, 16, 48, 48, 56);
#endif
#ifdef TLS_CIPHER_SM4_CCM
AGREE_ON(SM4_GCM, sm4_gcm, 12, 28, 32, 40);
AGREE_ON(SM4_CCM, sm4_ccm, 12, 28, 32, 40);
#endif
#ifdef TLS_CIPHER_ARIA_GCM_256
AGREE_ON(ARIA_GCM_128, aria_gcm_128, 12, 28, 32, 40);
AGREE_ON(ARIA_GCM_256, aria_gcm_256, 12, 44, 48, 56);
#endif

static void test_table(void)
{
	static const unsigned int others[] = { 0, 50, 59, 0x10000 + 51 };
	size_t start = offsetof(struct ktls_cipher, id);
	size_t end = offsetof(struct ktls_cipher, tls13) + 1;

	for (size_t i = 0; i < SIZE(facts); i++) {
		const struct ktls_cipher *row = ktls_cipher_at(i);

		CHECK(row && row == ktls_cipher_by_id(facts[i].id));
		CHECK(row && !strcmp(row->name, facts[i].name));
		CHECK(row &&
		      same((const char *)row + start,
			   (const char *)&facts[i] + start, end - start));
	}
	CHECK(!ktls_cipher_at(SIZE(facts)) && !ktls_cipher_at(SIZE_MAX));
	for (size_t i = 0; i < SIZE(others); i++)
		CHECK(!ktls_cipher_by_id(others[i]));
}

/* ---- Attach, install, query ---- */

static void test_attach(void)
{
	static const int errors[] = { 0,          ENOENT,   ENOPROTOOPT,
				      EOPNOTSUPP, ENOTCONN, EEXIST };

	for (size_t i = 0; i < SIZE(errors); i++) {
		EXPECT(SETSOCKOPT, .level = LEVEL_TCP, .option = ULP,
		       .bytes = "tls", .size = 4, .result = -errors[i]);
		EQUAL(ktls_attach(SOCKET), -errors[i]);
		finish();
	}
}

static void fill(uint8_t *to, size_t size, int first)
{
	for (size_t i = 0; i < size; i++)
		to[i] = (uint8_t)((size_t)first + i);
}

/* full: also the bytes past the cipher's sizes, which must not matter. */
static struct ktls_keys make_keys(const struct ktls_cipher *fact, int version,
				  int full)
{
	struct ktls_keys keys = { .version = (uint16_t)version,
				  .cipher = fact->id };

	fill(keys.key, full ? KTLS_MAX_KEY : fact->key_size, 0x40);
	fill(keys.iv, full ? KTLS_MAX_IV : fact->iv_size, 0x80);
	fill(keys.salt, full ? KTLS_MAX_SALT : fact->salt_size, 0xa0);
	fill(keys.rec_seq, KTLS_REC_SEQ, 0xc0);
	return keys;
}

/* The same keys as the kernel's crypto_info. */
static const uint8_t *make_info(const struct ktls_cipher *fact, int version)
{
	uint16_t start[2] = { (uint16_t)version, fact->id };
	static uint8_t info[56];

	memset(info, 0xee, sizeof(info));
	memcpy(info, start, sizeof(start));
	fill(info + fact->key_at, fact->key_size, 0x40);
	fill(info + fact->iv_at, fact->iv_size, 0x80);
	fill(info + fact->salt_at, fact->salt_size, 0xa0);
	fill(info + fact->rec_seq_at, KTLS_REC_SEQ, 0xc0);
	return info;
}

static void installs(const struct ktls_cipher *fact, int version, int direction,
		     int want)
{
	struct ktls_keys keys = make_keys(fact, version, 1);

	EXPECT(SETSOCKOPT, .level = LEVEL_TLS, .option = direction,
	       .bytes = make_info(fact, version), .size = fact->info_size,
	       .result = want);
	EQUAL(ktls_install(SOCKET, direction, &keys), want);
	finish();
}

/* Refused by the core itself: nothing is in the script. */
static void refuses(struct ktls_keys keys, int version, int cipher,
		    int direction)
{
	keys.version = (uint16_t)version;
	keys.cipher = (uint16_t)cipher;
	EQUAL(ktls_install(SOCKET, direction, &keys), -EINVAL);
}

static void test_install(void)
{
	for (size_t i = 0; i < SIZE(facts); i++)
		for (int direction = TX; direction <= RX; direction++) {
			if (facts[i].tls12)
				installs(&facts[i], 0x0303, direction, 0);
			if (facts[i].tls13)
				installs(&facts[i], 0x0304, direction, 0);
		}
	installs(&facts[0], 0x0303, TX, -ENOENT);
	installs(&facts[1], 0x0304, RX, -EBUSY);
}

static void test_install_refused(void)
{
	static const int versions[] = { 0, 0x0301, 0x0302, 0x0305, 0x0403 };
	static const int directions[] = { 0, 3, 4, 5, -1 };
	struct ktls_keys keys = make_keys(&facts[1], 0, 1);

	for (size_t i = 0; i < SIZE(versions); i++)
		refuses(keys, versions[i], 51, TX);
	for (size_t i = 0; i < SIZE(directions); i++)
		refuses(keys, 0x0304, 52, directions[i]);
	for (int cipher = 0; cipher <= UINT16_MAX; cipher++) {
		int known = cipher >= 51 && cipher <= 58;

		if (!known || !facts[cipher - 51].tls12)
			refuses(keys, 0x0303, cipher, TX);
		if (!known || !facts[cipher - 51].tls13)
			refuses(keys, 0x0304, cipher, RX);
	}
}

#define EXPECT_GET(...) EXPECT(GETSOCKOPT, .level = LEVEL_TLS, __VA_ARGS__)

static void queries(int direction, const struct ktls_keys *want, int error)
{
	struct ktls_keys keys;

	memset(&keys, 0xee, sizeof(keys));
	EQUAL(ktls_query(SOCKET, direction, &keys), error);
	CHECK(want ? same(&keys, want, sizeof(keys))
		   : zero(&keys, sizeof(keys)));
	finish();
}

static void query_one(const struct ktls_cipher *fact, int version,
		      int direction)
{
	struct ktls_keys want = make_keys(fact, version, 0);
	const uint8_t *info = make_info(fact, version);

	EXPECT_GET(.option = direction, .bytes = info, .size = 4);
	EXPECT_GET(.option = direction, .bytes = info, .size = fact->info_size);
	queries(direction, &want, 0);
}

static void test_query(void)
{
	for (size_t i = 0; i < SIZE(facts); i++)
		for (int direction = TX; direction <= RX; direction++) {
			query_one(&facts[i], 0x0303, direction);
			query_one(&facts[i], 0x0304, direction);
		}
}

static void test_query_fails(void)
{
	const uint8_t *info = make_info(&facts[0], 0x0304);
	static const uint16_t unknown[2] = { 0x0304, 59 };

	queries(0, NULL, -EINVAL);
	queries(3, NULL, -EINVAL);
	EXPECT_GET(.option = TX, .size = 4, .result = -EBUSY);
	queries(TX, NULL, -EBUSY);
	EXPECT_GET(.option = RX, .bytes = unknown, .size = 4);
	queries(RX, NULL, -EPROTO);
	EXPECT_GET(.option = TX, .bytes = info, .size = 4);
	EXPECT_GET(.option = TX, .bytes = info, .size = 40, .result = -EINVAL);
	queries(TX, NULL, -EINVAL);
}

static void installed(int direction, const uint16_t *want, int error)
{
	uint16_t version = 0xeeee, cipher = 0xeeee;

	EQUAL(ktls_installed(SOCKET, direction, &version, &cipher), error);
	EQUAL(version, want ? want[0] : 0);
	EQUAL(cipher, want ? want[1] : 0);
	finish();
}

/* It never asks for the keys: 4 bytes are all that it has room for. */
static void test_installed(void)
{
	static const uint16_t known[2] = { 0x0304, 51 }, unknown[2] = { 1, 59 };

	EXPECT_GET(.option = TX, .bytes = known, .size = 4);
	installed(TX, known, 0);
	EXPECT_GET(.option = RX, .bytes = unknown, .size = 4);
	installed(RX, unknown, 0);
	EXPECT_GET(.option = RX, .bytes = known, .size = 4, .result = -EBUSY);
	installed(RX, NULL, -EBUSY);
	installed(0, NULL, -EINVAL);
	installed(3, NULL, -EINVAL);
}

static void test_wipe(void)
{
	uint8_t memory[] = { 1, 2, 3, 4, 5 };

	saw_secret(LEVEL_TLS, TX, memory + 1,
		   3); /* only explicit_bzero will do */
	ktls_wipe(memory + 1, 3);
	CHECK(memory[0] == 1 && zero(memory + 1, 3) && memory[4] == 5);
}

/* ---- TCP's stream ---- */

struct tcp_begin {
	uint8_t state, others[119];
	uint64_t acked, received;
};

#define EXPECT_TCP(info, length)                                               \
	EXPECT(GETSOCKOPT, .level = LEVEL_TCP, .option = INFO, .bytes = info,  \
	       .size = length)
#define EXPECT_QUEUE(bytes) EXPECT(IOCTL, .option = OUTQ, .result = bytes)

static void stream_is(int error, uint8_t state, uint64_t acked, uint64_t queued,
		      uint64_t received)
{
	struct ktls_stream stream;

	memset(&stream, 0xee, sizeof(stream));
	EQUAL(ktls_get_stream(SOCKET, &stream), error);
	EQUAL(stream.state, state);
	EQUAL(stream.acked, acked);
	EQUAL(stream.queued, queued);
	EQUAL(stream.received, received);
	finish();
}

/* All at one moment: else what was acknowledged meanwhile would count twice. */
static void test_stream(void)
{
	static const struct tcp_begin one = { 1, { 0xff }, 1ull << 40, 7 };
	static const struct tcp_begin more = { 8, { 0xff }, 5ull << 40, 9 };

	EXPECT_TCP(&one, 136);
	EXPECT_QUEUE(3);
	EXPECT_TCP(&one, 136);
	stream_is(0, 1, 1ull << 40, 3, 7);
	EXPECT_TCP(&one, 136);
	EXPECT_QUEUE(3);
	EXPECT_TCP(&more, 136);
	EXPECT_TCP(&more, 136);
	EXPECT_QUEUE(1);
	EXPECT_TCP(&more, 136);
	stream_is(0, 8, 5ull << 40, 1, 9);
	EXPECT(GETSOCKOPT, .level = LEVEL_TCP, .option = INFO, .size = 136,
	       .result = -EOPNOTSUPP);
	stream_is(-EOPNOTSUPP, 0, 0, 0, 0);
	EXPECT_TCP(&one, 136);
	EXPECT(IOCTL, .option = OUTQ, .result = -EINVAL);
	stream_is(-EINVAL, 0, 0, 0, 0);
	EXPECT_TCP(&one, 136);
	EXPECT_QUEUE(3);
	EXPECT(GETSOCKOPT, .level = LEVEL_TCP, .option = INFO, .size = 136,
	       .result = -EBADF);
	stream_is(-EBADF, 0, 0, 0, 0);
}

/* ---- Options ---- */

/* A value out of range is the kernel's to judge, if it fits. */
static const uint16_t lengths[] = { 0, 1, 64, 512, 0x1234, 16384, UINT16_MAX };
static const uint32_t values[] = { 0, 1, 0x12345678, UINT32_MAX };
static const int refusals[] = { 0, ENOPROTOOPT, EOPNOTSUPP, EINVAL, EBUSY };

static void sets(int option, unsigned int value, const void *bytes, size_t size,
		 int want)
{
	EXPECT(SETSOCKOPT, .level = LEVEL_TLS, .option = option, .bytes = bytes,
	       .size = size, .result = want);
	EQUAL(ktls_set_option(SOCKET, option, value), want);
	finish();
}

static void test_set_option(void)
{
	for (size_t i = 0; i < SIZE(lengths); i++)
		sets(MAX_PAYLOAD_LEN, lengths[i], &lengths[i], 2, 0);
	for (size_t i = 0; i < SIZE(values); i++) {
		sets(ZEROCOPY_RO, values[i], &values[i], 4, 0);
		sets(EXPECT_NO_PAD, values[i], &values[i], 4, 0);
	}
	for (size_t i = 0; i < SIZE(refusals); i++) {
		sets(MAX_PAYLOAD_LEN, 64, &lengths[2], 2, -refusals[i]);
		sets(ZEROCOPY_RO, 1, &values[1], 4, -refusals[i]);
	}
}

/* Cut to 16 bits these would be lengths: nothing is in the script. */
static void test_set_option_refused(void)
{
	static const unsigned int much[] = { 0x10000, 0x10000 + 512, UINT_MAX };

	for (size_t i = 0; i < SIZE(much); i++)
		EQUAL(ktls_set_option(SOCKET, MAX_PAYLOAD_LEN, much[i]),
		      -EINVAL);
}

static void answers(int option, const void *bytes, size_t size, int error,
		    unsigned int want)
{
	unsigned int value = 0xeeeeeeee;

	EXPECT_GET(.option = option, .bytes = bytes, .size = size,
		   .result = error);
	EQUAL(ktls_get_option(SOCKET, option, &value), error);
	EQUAL(value, want);
	finish();
}

static void test_get_option(void)
{
	for (size_t i = 0; i < SIZE(lengths); i++)
		answers(MAX_PAYLOAD_LEN, &lengths[i], 2, 0, lengths[i]);
	for (size_t i = 0; i < SIZE(values); i++) {
		answers(ZEROCOPY_RO, &values[i], 4, 0, values[i]);
		answers(EXPECT_NO_PAD, &values[i], 4, 0, values[i]);
	}
}

/* Whatever the kernel may have written by then. */
static void test_get_option_fails(void)
{
	for (size_t i = 1; i < SIZE(refusals); i++) {
		answers(MAX_PAYLOAD_LEN, &lengths[3], 2, -refusals[i], 0);
		answers(EXPECT_NO_PAD, &values[2], 4, -refusals[i], 0);
	}
}

/* ---- sendfile ---- */

/*
 * With a small SO_SNDBUF TCP_CORK is taken off, which pushes, and put back if it
 * was there.
 */
static void expect_push(int corked, int is_small)
{
	static const int values[] = { 0, 1 }, sizes[] = { 1 << 20, 0xfffff };

	EXPECT(GETSOCKOPT, .level = LEVEL_SOCKET, .option = SNDBUF,
	       .size = sizeof(int), .bytes = &sizes[is_small]);
	if (!is_small)
		return;
	EXPECT(GETSOCKOPT, .level = LEVEL_TCP, .option = CORK,
	       .size = sizeof(int), .bytes = &values[corked]);
	EXPECT(SETSOCKOPT, .level = LEVEL_TCP, .option = CORK,
	       .size = sizeof(int), .bytes = &values[0]);
	if (corked)
		EXPECT(SETSOCKOPT, .level = LEVEL_TCP, .option = CORK,
		       .size = sizeof(int), .bytes = &values[1]);
}

/* One call: where it must start, what it must ask for, bytes or -errno. */
struct step {
	uint64_t at;
	size_t chunk;
	ssize_t n;
};

#define FLUSH(n) { 0, SIZE_MAX, n }             /* an empty record instead */
#define FILE_IS(size) { size, SIZE_MAX - 1, 0 } /* big from here on */
#define SENDFILE(offset, count, stop, want, sent, ...)                         \
	check_sendfile(__LINE__, offset, count, stop, want, sent,              \
		       (const struct step[]){ __VA_ARGS__, { 0 } })

static int asked;

/* Answers what context points to, but 0 the first time. */
static int second_time(void *context)
{
	return ++asked > 1 ? *(int *)context : 0;
}

static void check_sendfile(int line, uint64_t offset, uint64_t count, int *stop,
			   int want, uint64_t want_sent,
			   const struct step *step)
{
	uint64_t sent = 0xeeeeeeeeeeeeeeee;
	ssize_t size = INT64_MAX;
	int error;

	for (; step->chunk; step++) {
		if (step->chunk == SIZE_MAX - 1) {
			size = (ssize_t)step->at;
			continue;
		}
		expect((struct call){ FSTAT64, line, .result = size });
		if (step->chunk == SIZE_MAX)
			expect((struct call){ SENDMSG, line, .type = 23,
					      .flags = MSG_NOSIGNAL,
					      .result = step->n });
		else
			expect((struct call){
				SENDFILE64, line, .offset = step->at,
				.size = step->chunk, .result = step->n });
	}
	if (want == -EAGAIN)
		expect_push(0, 1);
	error = ktls_sendfile(SOCKET, FILE_IN, offset, count, &sent,
			      stop ? second_time : NULL, stop);
	equal(error, want, "returned", line);
	equal((long long)sent, (long long)want_sent, "*sent", line);
	finish();
}

static void test_sendfile(void)
{
	int stop = -ECANCELED;

	SENDFILE(0, 0, &stop, 0, 0, FLUSH(0)); /* closes an open record */
	SENDFILE(5, 1000, &stop, 0, 1000, { 5, 1000, 1000 });
	/* The end of the offsets. */
	SENDFILE(INT64_MAX - 1, 1, &stop, -EFBIG, 0,
		 { INT64_MAX - 1, 1, -EFBIG });
	SENDFILE(INT64_MAX, 1, &stop, 0, 0, FLUSH(0));
	SENDFILE(INT64_MAX + UINT64_C(1), 1, &stop, -EOVERFLOW, 0, { 0 });
	SENDFILE(UINT64_MAX, UINT64_MAX, &stop, -EOVERFLOW, 0, { 0 });
	EQUAL(asked, 0); /* only short calls ask */
}

static void test_sendfile_big(void)
{
	SENDFILE(0, ONE_CALL, NULL, 0, ONE_CALL, { 0, ONE_CALL, ONE_CALL });
	SENDFILE(0, 0x7ffff001, NULL, 0, 0x7ffff001, { 0, ONE_CALL, ONE_CALL },
		 { ONE_CALL, 1, 1 });
	/* Over 2^31 and 2^32, in the offset, the count and the sum. */
	SENDFILE(0x7fffffff, 0x140000001, NULL, 0, 0x140000001,
		 { 0x7fffffff, ONE_CALL, ONE_CALL },
		 { 0xffffefff, ONE_CALL, ONE_CALL },
		 { 0x17fffdfff, 0x40002001, 0x40002001 });
	/* A short call up there: goes on where it stopped. */
	SENDFILE(0x7fffff000000, 0x7ffff020, NULL, 0, 0x7ffff020,
		 { 0x7fffff000000, ONE_CALL, 0x10 },
		 { 0x7fffff000010, ONE_CALL, ONE_CALL },
		 { 0x80007efff010, 0x10, 0x10 });
}

/* Never a byte beyond the file's end is asked for, however big count is. */
static void test_sendfile_eof(void)
{
	SENDFILE(3, 100, NULL, 0, 70, FILE_IS(73), { 3, 70, 70 });
	SENDFILE(3, UINT64_MAX, NULL, 0, 70, FILE_IS(73), { 3, 70, 70 });
	SENDFILE(0, UINT64_MAX, NULL, 0, 0xbffff000, FILE_IS(0xbffff000),
		 { 0, ONE_CALL, ONE_CALL },
		 { ONE_CALL, 0x40000000, 0x40000000 });
	SENDFILE(0, UINT64_MAX, NULL, 0, ONE_CALL, FILE_IS(ONE_CALL),
		 { 0, ONE_CALL, ONE_CALL });
	/* Nothing left. The record may be open: send(MSG_MORE) of a header. */
	SENDFILE(7, UINT64_MAX, NULL, 0, 0, FILE_IS(7), FLUSH(0));
	SENDFILE(7, 10, NULL, 0, 0, FILE_IS(3), FLUSH(0));
	SENDFILE(7, 10, NULL, -EAGAIN, 0, FILE_IS(3), FLUSH(-EAGAIN));
	SENDFILE(7, 10, NULL, 0, 0, FILE_IS(3), FLUSH(-EINTR), FLUSH(0));
}

/* It grows or shrinks while it is sent. */
static void test_sendfile_sizes(void)
{
	uint64_t sent = 0xeeeeeeeeeeeeeeee;

	SENDFILE(3, 100, NULL, 0, 70, FILE_IS(73), { 3, 70, 40 },
		 { 43, 30, -EINTR }, { 43, 30, 30 });
	SENDFILE(3, 100, NULL, 0, 100, FILE_IS(73), { 3, 70, 40 }, FILE_IS(200),
		 { 43, 60, 60 });
	SENDFILE(3, 100, NULL, 0, 40, FILE_IS(73), { 3, 70, 40 }, FILE_IS(43),
		 FLUSH(0));
	SENDFILE(3, 100, NULL, 0, 40, FILE_IS(73), { 3, 70, 40 }, FILE_IS(1),
		 FLUSH(0));
	/* What went out is told although the flush failed. */
	SENDFILE(3, 100, NULL, -EPIPE, 40, FILE_IS(73), { 3, 70, 40 },
		 FILE_IS(43), FLUSH(-EPIPE));
	/* It says 73, and has nothing: was cut meanwhile, or is in sysfs. */
	EXPECT(FSTAT64, .result = 73);
	EXPECT(SENDFILE64, .offset = 3, .size = 70);
	EXPECT(SENDMSG, .type = 23, .flags = MSG_NOSIGNAL);
	EQUAL(ktls_sendfile(SOCKET, FILE_IN, 3, 100, &sent, NULL, NULL), 0);
	EQUAL(sent, 0);
	finish();
}

static void test_sendfile_interrupted(void)
{
	int stop = -ECANCELED, go_on = 0;

	SENDFILE(0, 100, NULL, 0, 100, { 0, 100, -EINTR }, { 0, 100, 30 },
		 { 30, 70, -EINTR }, { 30, 70, -EINTR }, { 30, 70, 70 });
	SENDFILE(0, 100, &go_on, 0, 100, { 0, 100, -EINTR }, { 0, 100, 30 },
		 { 30, 70, -EINTR }, { 30, 70, 70 });
	EQUAL(asked, 3);
	asked = 0; /* stopped at a short call */
	SENDFILE(8, 100, &stop, -ECANCELED, 30, { 8, 100, -EINTR },
		 { 8, 100, 30 });
	asked = 0; /* stopped at EINTR */
	SENDFILE(8, 100, &stop, -ECANCELED, 30, { 8, 100, 30 },
		 { 38, 70, -EINTR });
	EQUAL(asked, 2);
}

static void test_sendfile_errno(void)
{
	uint64_t sent = 0xeeeeeeeeeeeeeeee;
	int stop = -ECANCELED;

	SENDFILE(0, 10, &stop, -EPIPE, 0, { 0, 10, -EPIPE });
	EQUAL(asked, 0); /* an error is nothing to ask about */
	SENDFILE(0, 100, &stop, -EAGAIN, 30, { 0, 100, 30 },
		 { 30, 70, -EAGAIN });
	SENDFILE(0, UINT64_MAX, NULL, -EIO, ONE_CALL, { 0, ONE_CALL, ONE_CALL },
		 { ONE_CALL, ONE_CALL, -EIO });
	EXPECT(FSTAT64, .result = -EBADF);
	EQUAL(ktls_sendfile(SOCKET, FILE_IN, 0, 1, &sent, NULL, NULL), -EBADF);
	EQUAL(sent, 0);
	finish();
}

/* ---- Records ---- */

static void sends(uint8_t type, const void *data, size_t size, int flags,
		  ssize_t want)
{
	EXPECT(SENDMSG, .type = type, .bytes = data, .size = size,
	       .flags = flags | MSG_NOSIGNAL, .result = want);
	EQUAL(ktls_send_record(SOCKET, type, data, size, flags), want);
	finish();
}

static void test_send_record(void)
{
	static uint8_t data[KTLS_MAX_PAYLOAD + 1];

	fill(data, sizeof(data), 1);
	for (int type = 0; type <= UINT8_MAX; type++)
		sends((uint8_t)type, data, (size_t)type, 0, type);
	sends(23, data, KTLS_MAX_PAYLOAD, MSG_DONTWAIT, KTLS_MAX_PAYLOAD);
	sends(22, data, 9, MSG_NOSIGNAL, 4); /* the kernel took a part */
	sends(21, NULL, 0, 0, 0);
	sends(21, data, 2, 0, -EAGAIN);
	EQUAL(ktls_send_record(SOCKET, 23, data, sizeof(data), 0), -EMSGSIZE);
	EQUAL(ktls_send_record(SOCKET, 23, data, SIZE_MAX, 0), -EMSGSIZE);
}

static void test_flush(void)
{
	static const int flags[] = { 0, MSG_DONTWAIT, MSG_NOSIGNAL };
	static const int errors[] = { 0, EAGAIN, ECONNRESET };

	for (size_t i = 0; i < SIZE(errors); i++) {
		EXPECT(SENDMSG, .type = 23, .flags = flags[i] | MSG_NOSIGNAL,
		       .result = -errors[i]);
		EQUAL(ktls_flush(SOCKET, flags[i]), -errors[i]);
		finish();
	}
}

static void test_push(void)
{
	static const int small = 4608;

	for (int way = 0; way < 4; way++) {
		expect_push(way & 1, way >> 1);
		EQUAL(ktls_push(SOCKET), 0);
		finish();
	}
	EXPECT(GETSOCKOPT, .level = LEVEL_SOCKET, .option = SNDBUF,
	       .size = sizeof(int), .result = -EBADF);
	EQUAL(ktls_push(SOCKET), -EBADF);
	finish();
	EXPECT(GETSOCKOPT, .level = LEVEL_SOCKET, .option = SNDBUF,
	       .size = sizeof(int), .bytes = &small);
	EXPECT(GETSOCKOPT, .level = LEVEL_TCP, .option = CORK,
	       .size = sizeof(int), .result = -EBADF);
	EQUAL(ktls_push(SOCKET), -EBADF);
	finish();
}

/* What the record's sendmsg and the keys' setsockopt answer; what comes of it. */
static void updates(const struct ktls_cipher *fact, int request, int flags,
		    ssize_t sent, int set, int want, int want_installed)
{
	const uint8_t message[] = { 24, 0, 0, 1, request != 0 };
	struct ktls_keys keys = make_keys(fact, 0x0304, 1);
	int installed = 0xee;

	EXPECT(SENDMSG, .type = 22, .bytes = message, .size = 5,
	       .flags = flags | MSG_NOSIGNAL, .result = sent);
	if (sent == 5)
		EXPECT(SETSOCKOPT, .level = LEVEL_TLS, .option = TX,
		       .bytes = make_info(fact, 0x0304),
		       .size = fact->info_size, .result = set);
	EQUAL(ktls_update_key(SOCKET, &keys, request, flags, &installed), want);
	EQUAL(installed, want_installed);
	finish();
}

static void test_update_key(void)
{
	for (size_t i = 0; i < SIZE(facts); i++) {
		if (!facts[i].tls13)
			continue;
		updates(&facts[i], 0, MSG_DONTWAIT, 5, 0, 0, 0);
		updates(&facts[i], 1, 0, 5, 0, 0, 0);
	}
	updates(&facts[0], 0x100, 0, 5, 0, 0, 0); /* still the byte 1 */
}

/* The record's failure is all; that of the keys comes beside a success. */
static void test_update_key_fails(void)
{
	static const int errors[] = { EAGAIN, EINTR, EPIPE, EBADMSG };

	for (size_t i = 0; i < SIZE(errors); i++)
		updates(&facts[1], 0, 0, -errors[i], 0, -errors[i], 0);
	updates(&facts[1], 0, 0, 5, -EBUSY, 0, -EBUSY);
	updates(&facts[1], 1, 0, 5, -ENOMEM, 0, -ENOMEM);
	/* A part of the record: the peer waits for the rest, not for keys. */
	updates(&facts[1], 0, 0, 4, 0, 0, -EIO);
	updates(&facts[1], 0, 0, 0, 0, 0, -EIO);
}

/* What came: bytes or -errno, flags, a cmsg; what is made of it. */
static void receives(ssize_t came, int msg_flags, size_t cmsg_len, int level,
		     int cmsg_type, uint8_t value, ssize_t want, int type,
		     int end)
{
	struct ktls_record record = { 0xee, 0xee };
	char data[9] = { 0 };

	EXPECT(RECVMSG, .size = 8, .flags = MSG_PEEK, .bytes = "payload",
	       .result = came, .msg_flags = msg_flags, .cmsg_len = cmsg_len,
	       .cmsg_level = level, .cmsg_type = cmsg_type, .type = value);
	EQUAL(ktls_recv_record(SOCKET, data, 8, MSG_PEEK, &record), want);
	CHECK(want < 0 || same(data, "payload", (size_t)want));
	EQUAL(record.type, type);
	EQUAL(record.end, end);
	finish();
}

#define NO_CMSG 0, 0, 0, 0
#define TYPE CMSG_LEN(1), LEVEL_TLS, GET_RECORD_TYPE

static void test_recv_record(void)
{
	receives(7, 0, TYPE, 23, 7, 23, 0);
	receives(8, MSG_EOR, TYPE, 23, 8, 23, 1);
	receives(2, MSG_EOR, TYPE, 21, 2, 21, 1);
	receives(1, MSG_TRUNC, TYPE, 255, 1, 255, 0);
	receives(0, MSG_EOR, TYPE, 23, 0, 23, 1); /* an empty record */
	receives(0, 0, NO_CMSG, 0, 0, 0);         /* the end of the stream */
	receives(5, 0, NO_CMSG, 5, 0, 0);         /* plain TCP */
	receives(-EAGAIN, 0, NO_CMSG, -EAGAIN, 0, 0);
	receives(-EBADMSG, 0, NO_CMSG, -EBADMSG, 0, 0);
}

static void test_recv_record_distrusts(void)
{
	receives(1, MSG_CTRUNC, TYPE, 23, -EPROTO, 0, 0);
	receives(1, MSG_CTRUNC | MSG_EOR, NO_CMSG, -EPROTO, 0, 0);
	receives(1, 0, CMSG_LEN(0), LEVEL_TLS, 2, 23, -EPROTO, 0, 0);
	receives(1, 0, CMSG_LEN(2), LEVEL_TLS, 2, 23, -EPROTO, 0, 0);
	receives(1, 0, CMSG_LEN(1), LEVEL_TLS, 1, 23, -EPROTO, 0, 0);
	receives(1, 0, CMSG_LEN(1), SOL_SOCKET, 2, 23, -EPROTO, 0, 0);
}

/* ---- recvfile ---- */

/* One call: into the pipe or out of it (then to where), bytes or -errno. */
struct move {
	enum kind kind;
	uint64_t at;
	size_t size;
	ssize_t n;
};

#define RECVFILE(offset, count, want, written, held, refusal, ...)             \
	check_recvfile(__LINE__, 256, offset, count, want,                     \
		       (struct ktls_received){ written, held, refusal },       \
		       (const struct move[]){ __VA_ARGS__, { 0 } })
#define IN(size, n) { SPLICE_IN, 0, size, n }
#define OUT(at, size, n) { SPLICE_OUT, at, size, n }

static void check_recvfile(int line, int pages, uint64_t offset, size_t count,
			   int want, struct ktls_received wanted,
			   const struct move *move)
{
	static const int pipe[2] = { PIPE_OUT, PIPE_IN };
	struct ktls_received got = { 0xee, 0xee, 0xee };

	if (offset <= INT64_MAX)
		expect((struct call){
			FCNTL64, line, .option = F_GETPIPE_SZ,
			.result = pages < 0 ? pages : pages * getpagesize() });
	for (; move->kind; move++)
		expect((struct call){ move->kind, line, .offset = move->at,
				      .size = move->size, .result = move->n });
	equal(ktls_recvfile(SOCKET, pipe, FILE_IN, offset, count, &got), want,
	      "returned", line);
	equal((long long)got.written, (long long)wanted.written, "written",
	      line);
	equal((long long)got.held, (long long)wanted.held, "held", line);
	equal(got.refusal, wanted.refusal, "refusal", line);
	finish();
}

static void test_recvfile(void)
{
	RECVFILE(5, 0, 0, 0, 0, 0, { 0 });
	RECVFILE(5, 100, 0, 100, 0, 0, IN(100, 100), OUT(5, 100, 100));
	/* Records fill the pipe one by one; the file may take it in parts. */
	RECVFILE(7, 100, 0, 100, 0, 0, IN(100, 60), IN(40, 40), OUT(7, 100, 30),
		 OUT(37, 70, 70));
	/* The offset is a file's, not an int's. */
	RECVFILE(INT64_MAX - 1, 1, 0, 1, 0, 0, IN(1, 1),
		 OUT(INT64_MAX - 1, 1, 1));
	RECVFILE(INT64_MAX + UINT64_C(1), 1, -EOVERFLOW, 0, 0, 0, { 0 });
}

/* No record begins where its pieces may find no slot: Linux would lose them. */
static void test_recvfile_pipe(void)
{
	static const struct ktls_received none = { 0, 0, 0 },
					  two = { 20, 0, 0 };
	static const struct move nothing[] = { { 0 } };

	check_recvfile(__LINE__, 16, 0, 100, -ENOBUFS, none, nothing);
	check_recvfile(__LINE__, 45, 0, 100, -ENOBUFS, none, nothing);
	check_recvfile(__LINE__, -EBADF, 0, 100, -EBADF, none, nothing);
	check_recvfile(
		__LINE__, 2 * 46, 0, 100, 0, two,
		(const struct move[]){
			IN(100, 10), IN(90, 10), OUT(0, 20, 20), { 0 } });
}

static void test_recvfile_stops(void)
{
	static const int errors[] = { EAGAIN,   EINVAL,      EBADMSG,
				      EMSGSIZE, EKEYEXPIRED, ECONNRESET };

	RECVFILE(0, 100, 0, 0, 0, 0, IN(100, 0));
	RECVFILE(0, 100, 0, 60, 0, 0, IN(100, 60), IN(40, 0), OUT(0, 60, 60));
	for (size_t i = 0; i < SIZE(errors); i++) {
		RECVFILE(0, 100, -errors[i], 0, 0, 0, IN(100, -errors[i]));
		/* What came before is in the file all the same. */
		RECVFILE(9, 100, -errors[i], 60, 0, 0, IN(100, 60),
			 IN(40, -errors[i]), OUT(9, 60, 60));
	}
	RECVFILE(0, 100, 0, 100, 0, 0, IN(100, -EINTR), IN(100, 100),
		 OUT(0, 100, -EINTR), OUT(0, 100, 100));
}

/* What the file refuses is still in the pipe. */
static void test_recvfile_refused(void)
{
	RECVFILE(0, 100, 0, 0, 100, -ENOSPC, IN(100, 100),
		 OUT(0, 100, -ENOSPC));
	RECVFILE(0, 100, -EBADMSG, 20, 40, -ENOSPC, IN(100, 60),
		 IN(40, -EBADMSG), OUT(0, 60, 20), OUT(20, 40, -ENOSPC));
	RECVFILE(0, 100, 0, 0, 100, -EIO, IN(100, 100), OUT(0, 100, 0));
}

/* test_core.py reads the names from this table. */
static const struct {
	const char *name;
	void (*run)(void);
} tests[] = {
	{ "cipher table", test_table },
	{ "attach", test_attach },
	{ "install", test_install },
	{ "install: refused without a system call", test_install_refused },
	{ "query", test_query },
	{ "query: failures give zeros", test_query_fails },
	{ "installed", test_installed },
	{ "stream", test_stream },
	{ "wipe", test_wipe },
	{ "set_option", test_set_option },
	{ "set_option: refused without a call", test_set_option_refused },
	{ "get_option", test_get_option },
	{ "get_option: failures give zero", test_get_option_fails },
	{ "sendfile: one call", test_sendfile },
	{ "sendfile: gigabytes", test_sendfile_big },
	{ "sendfile: the file ends early", test_sendfile_eof },
	{ "sendfile: the file's size changes", test_sendfile_sizes },
	{ "sendfile: interrupted", test_sendfile_interrupted },
	{ "sendfile: errno", test_sendfile_errno },
	{ "send_record", test_send_record },
	{ "update_key", test_update_key },
	{ "update_key: either call fails", test_update_key_fails },
	{ "flush", test_flush },
	{ "push", test_push },
	{ "recv_record", test_recv_record },
	{ "recv_record: distrusts", test_recv_record_distrusts },
	{ "recvfile", test_recvfile },
	{ "recvfile: the pipe's room", test_recvfile_pipe },
	{ "recvfile: stops", test_recvfile_stops },
	{ "recvfile: refused", test_recvfile_refused },
};

int main(void)
{
	int failed = 0;

	printf("1..%zu\n", SIZE(tests));
	for (size_t i = 0; i < SIZE(tests); i++) {
		failures = asked = 0;
		tests[i].run();
		finish();
		printf("%sok %zu - %s\n", failures ? "not " : "", i + 1,
		       tests[i].name);
		fflush(stdout); /* not lost if a sanitizer ends the next */
		failed += failures > 0;
	}
	return failed > 0;
}
