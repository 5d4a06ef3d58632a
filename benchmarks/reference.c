// SPDX-License-Identifier: MIT
/*
 * The limit: src/ktls.c alone, with fixed keys and no Python.
 *
 * usage: reference LISTENING_FD DIRECTORY
 *
 * Each connection gets a thread and makes one request, "OPERATION COUNT SIZE" in
 * 64 bytes of plain TCP: keys are installed after it, for the direction that carries the
 * data. SIZE names the file, too: DIRECTORY/SIZE.
 *
 *   plain     sendfile(2) COUNT times, without TLS
 *   sendfile  ktls_sendfile() COUNT times
 *   contract  what Socket.sendfile() promises besides: it finds the file's size,
 *             and leaves the file's position behind the last byte
 *   send      send(2) of SIZE bytes COUNT times
 *   corked    the same, joined by MSG_MORE
 *   recv      ktls_recv_record() into SIZE bytes until COUNT * SIZE have come
 *   recvfile  the same by ktls_recvfile() into a file without a name
 *   check, checkfile  these two, and "right\n" is the answer if what came was
 *             DIRECTORY/16384 again and again
 */
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64

#include "ktls.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define PIPE_SIZE (1 << 20)
#define REQUEST_SIZE 64

/* As benchmarks/peer.py has them, too: all zero, from sequence 0. */
static const struct ktls_keys fixed_keys = {
	.version = KTLS_VERSION_1_3,
	.cipher = KTLS_CIPHER_AES_GCM_256,
};

static const char *directory;

struct request {
	char operation[16];
	uint64_t count, size;
};

static void die(const char *what, int error)
{
	fprintf(stderr, "reference: %s: %s\n", what, strerror(error));
	exit(1);
}

/* Not a byte more: what follows it may be a record. */
static int read_request(int fd, struct request *request)
{
	char line[REQUEST_SIZE + 1] = "";

	if (recv(fd, line, REQUEST_SIZE, MSG_WAITALL) != REQUEST_SIZE)
		return 0;
	return sscanf(line, "%15s %" SCNu64 " %" SCNu64, request->operation,
		      &request->count, &request->size) == 3;
}

static int open_file(uint64_t size)
{
	char path[4096];
	int file;

	snprintf(path, sizeof(path), "%s/%" PRIu64, directory, size);
	file = open(path, O_RDONLY | O_CLOEXEC);
	if (file < 0)
		die(path, errno);
	return file;
}

static void send_plain(int fd, int file, uint64_t size)
{
	off_t at = 0;

	while ((uint64_t)at < size)
		if (sendfile(fd, file, &at, size - (uint64_t)at) <= 0)
			die("sendfile", errno);
}

static void send_file(int fd, int file, uint64_t size)
{
	uint64_t sent;
	int error = ktls_sendfile(fd, file, 0, size, &sent, NULL, NULL);

	if (error)
		die("ktls_sendfile", -error);
}

static void send_contract(int fd, int file, uint64_t size)
{
	struct stat info;

	(void)size;
	if (fstat(file, &info))
		die("fstat", errno);
	send_file(fd, file, (uint64_t)info.st_size);
	if (lseek(file, info.st_size, SEEK_SET) < 0)
		die("lseek", errno);
}

static void send_files(int fd, const struct request *request,
		       void (*one)(int, int, uint64_t))
{
	int file = open_file(request->size);

	for (uint64_t i = 0; i < request->count; i++)
		one(fd, file, request->size);
	close(file);
}

static char *map(int file, uint64_t size)
{
	void *data =
		mmap(NULL, size, PROT_READ, MAP_SHARED | MAP_POPULATE, file, 0);

	if (data == MAP_FAILED)
		die("mmap", errno);
	return data;
}

/* A file's content; mapped before the first measurement: by the verification. */
static const char *in_memory(uint64_t size)
{
	static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
	static struct {
		uint64_t size;
		const char *data;
	} known[64];
	size_t i = 0;

	pthread_mutex_lock(&lock);
	while (known[i].data && known[i].size != size)
		if (++i == sizeof(known) / sizeof(known[0]))
			die("in_memory", ENOSPC);
	if (!known[i].data) {
		int file = open_file(size);

		known[i].size = size;
		known[i].data = map(file, size);
		close(file);
	}
	pthread_mutex_unlock(&lock);
	return known[i].data;
}

static void send_buffer(int fd, const struct request *request, int flags)
{
	const char *data = in_memory(request->size);

	for (uint64_t i = 0; i < request->count; i++)
		for (uint64_t at = 0; at < request->size;) {
			ssize_t n = send(fd, data + at, request->size - at,
					 flags | MSG_NOSIGNAL);

			if (n < 0)
				die("send", errno);
			at += (uint64_t)n;
		}
	if (flags & MSG_MORE)
		ktls_flush(fd, 0);
}

/* Whether these bytes, at an offset of all, are the pattern's. */
static int is_right(const char *data, size_t size, uint64_t at)
{
	const char *pattern = in_memory(KTLS_MAX_PAYLOAD);

	for (size_t i = 0; i < size; i++)
		if (data[i] != pattern[(at + i) % KTLS_MAX_PAYLOAD])
			return 0;
	return 1;
}

static int receive(int fd, const struct request *request, int check)
{
	uint64_t total = request->count * request->size, at = 0;
	char *buffer = calloc(1, request->size);
	int right = 1;

	while (at < total) {
		struct ktls_record record;
		ssize_t n =
			ktls_recv_record(fd, buffer, request->size, 0, &record);

		if (n <= 0 || record.type != KTLS_RECORD_DATA)
			die("ktls_recv_record", n < 0 ? (int)-n : EPROTO);
		if (check)
			right &= is_right(buffer, (size_t)n, at);
		at += (uint64_t)n;
	}
	free(buffer);
	return right;
}

static int receive_file(int fd, const struct request *request, int check)
{
	uint64_t total = request->count * request->size, at = 0;
	int pipe[2], file = memfd_create("received", MFD_CLOEXEC), right = 1;

	if (file < 0 || pipe2(pipe, O_CLOEXEC | O_NONBLOCK))
		die("pipe2", errno);
	fcntl(pipe[1], F_SETPIPE_SZ, PIPE_SIZE);
	while (at < total) {
		uint64_t left = total - at;
		size_t most = left < PIPE_SIZE ? (size_t)left : PIPE_SIZE;
		struct ktls_received received;
		int error = ktls_recvfile(fd, pipe, file, at, most, &received);
		char byte;

		at += received.written;
		if (error == -EAGAIN && at < total)
			recv(fd, &byte, 1, MSG_PEEK); /* waits */
		else if (error && error != -EAGAIN)
			die("ktls_recvfile", -error);
	}
	if (check)
		right = is_right(map(file, total), total, 0);
	close(pipe[0]);
	close(pipe[1]);
	close(file);
	return right;
}

static void install(int fd, int direction)
{
	int error = ktls_attach(fd);

	if (!error)
		error = ktls_install(fd, direction, &fixed_keys);
	if (error)
		die("kernel TLS", -error);
}

static void serve(int fd, const struct request *request)
{
	const char *operation = request->operation;
	int check = !strncmp(operation, "check", 5), right = 0;
	int receives = check || !strncmp(operation, "recv", 4);

	if (!strcmp(operation, "plain")) {
		send_files(fd, request, send_plain);
		return;
	}
	install(fd, receives ? KTLS_RX : KTLS_TX);
	if (!strcmp(operation, "sendfile"))
		send_files(fd, request, send_file);
	else if (!strcmp(operation, "contract"))
		send_files(fd, request, send_contract);
	else if (!strcmp(operation, "send"))
		send_buffer(fd, request, 0);
	else if (!strcmp(operation, "corked"))
		send_buffer(fd, request, MSG_MORE);
	else if (!strcmp(operation, "recv") || !strcmp(operation, "check"))
		right = receive(fd, request, check);
	else if (!strcmp(operation, "recvfile") ||
		 !strcmp(operation, "checkfile"))
		right = receive_file(fd, request, check);
	else
		die(operation, EINVAL);
	if (check && right && write(fd, "right\n", 6) != 6)
		die("write", errno);
}

static void *handle(void *argument)
{
	int fd = (int)(intptr_t)argument;
	const int on = 1;
	struct request request;

	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
	if (read_request(fd, &request))
		serve(fd, &request);
	/* What was sent is on its way; the peer waits for this end. */
	close(fd);
	return NULL;
}

int main(int argc, char **argv)
{
	int listener = argc == 3 ? atoi(argv[1]) : -1;
	pthread_attr_t detached;

	if (listener < 0) {
		fprintf(stderr, "usage: reference LISTENING_FD DIRECTORY\n");
		return 2;
	}
	directory = argv[2];
	pthread_attr_init(&detached);
	pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
	for (;;) {
		int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
		pthread_t thread;

		if (fd < 0)
			return 0;
		if (pthread_create(&thread, &detached, handle,
				   (void *)(intptr_t)fd))
			die("pthread_create", EAGAIN);
	}
}
