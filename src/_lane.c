// SPDX-License-Identifier: MIT
/*
 * ktls._ktls.Lane: what a send costs when there is nothing to think about
 *
 * A KernelSender (ktls/sending.py) has to look after keys, records that are
 * owed to the peer, other threads, errors that stay. Most sends meet none of
 * that, and what it takes to see so in Python is more than the system call.
 * This sees it in C: it does the whole send, or nothing and returns None, and
 * Python takes its time. A sendfile waits for room here, and leaves it to its
 * owner to go on where something is to be thought about in the midst of it.
 *
 * What there is to think about is told by `attention`, which anyone may set at
 * any time, and who holds the lock takes away. `used` and `limit` count the
 * records that a key has protected, and may; `sent` the bytes that the kernel
 * took, here and by the sender, for ktls/tally.py. The lock is the lane's own, a
 * semaphore: those of Python ask the clock even where nobody waits, which is a
 * system call on some machines, and the one of threading takes longer to call
 * than a small send has.
 */
#define PY_SSIZE_T_CLEAN
#define _FILE_OFFSET_BITS 64
#include <Python.h>
#include <structmember.h>

#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "_lane.h"
#include "ktls.h"

#define PUSH_AGAIN 200 /* ms: as PUSH_AGAIN of ktls/wait.py */

struct lane {
	PyObject_HEAD int fd;
	char attention;
	char nonblocking; /* the descriptor is, whatever the socket's timeout */
	unsigned int max_fragment;
	unsigned long long used, limit, sent;
	sem_t turn; /* the lock */
	char locked;
	unsigned long owner; /* thread, while it is locked, ... */
	unsigned int forks;  /* ... and what they were when it got it */
};

/* Kept for as long as the process lives; the first two are of the io module. */
static PyObject *buffered_reader, *file_io, *name_raw, *name_seek,
	*name_gettimeout, *name_after_file;
static PyTypeObject *lane_type;

/*
 * How often this process has been made by a fork since then. The thread that has
 * a lock stays in the parent, unless it is the one that forked.
 */
static unsigned int forks;

static void forked(void)
{
	forks++;
}

static PyObject *lane_new(PyTypeObject *type, PyObject *args,
			  PyObject *keywords)
{
	struct lane *lane =
		(struct lane *)PyType_GenericNew(type, args, keywords);

	if (!lane)
		return NULL;
	lane->fd = -1;
	lane->max_fragment = KTLS_MAX_PAYLOAD;
	sem_init(&lane->turn, 0, 1); /* can't fail: 1 isn't too much */
	return (PyObject *)lane;
}

static int lane_init(PyObject *object, PyObject *args, PyObject *keywords)
{
	static char *names[] = { "fd", "max_fragment", "used", "limit", NULL };
	struct lane *lane = (struct lane *)object;
	unsigned int max_fragment;

	if (!PyArg_ParseTupleAndKeywords(args, keywords, "iIKK", names,
					 &lane->fd, &max_fragment, &lane->used,
					 &lane->limit))
		return -1;
	if (!max_fragment) {
		PyErr_SetString(PyExc_ValueError, "max_fragment must not be 0");
		return -1;
	}
	lane->max_fragment = max_fragment;
	return 0;
}

static void lane_dealloc(PyObject *object)
{
	struct lane *lane = (struct lane *)object;
	PyTypeObject *type = Py_TYPE(object);

	sem_destroy(&lane->turn);
	type->tp_free(object);
	Py_DECREF(type);
}

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

/* How many records so many bytes can make at the most. */
static unsigned long long records(const struct lane *lane, uint64_t bytes)
{
	return bytes / lane->max_fragment + 1;
}

/* Whether the key may protect so many bytes; for who holds the lock. */
static int fits(const struct lane *lane, uint64_t bytes)
{
	return lane->used < lane->limit &&
	       records(lane, bytes) + 1 < lane->limit - lane->used;
}

/*
 * How much of so many bytes of a file the key may still protect, in full records
 * if it isn't all; 0 near its end. For who holds the lock.
 */
static uint64_t most_of(const struct lane *lane, uint64_t count)
{
	unsigned long long left =
		lane->used < lane->limit ? lane->limit - lane->used : 0;

	if (fits(lane, count))
		return count;
	return left > 3 ? (left - 3) * lane->max_fragment : 0;
}

static void leave(struct lane *lane)
{
	lane->locked = 0;
	sem_post(&lane->turn);
}

/* For who has got the lock. */
static void take(struct lane *lane)
{
	lane->locked = 1;
	lane->owner = PyThread_get_thread_ident();
	lane->forks = forks;
}

/* Takes the lock, if nobody has it. */
static int try_to_take(struct lane *lane)
{
	if (sem_trywait(&lane->turn))
		return 0;
	take(lane);
	return 1;
}

/* Takes the lock, if there is nothing to think about and nobody else sends. */
static int enter(struct lane *lane)
{
	if (lane->attention || lane->fd < 0 || !try_to_take(lane))
		return 0;
	if (!lane->attention && lane->fd >= 0)
		return 1;
	leave(lane);
	return 0;
}

/*
 * After a short call, the caller gives the lock back before signal handlers run:
 * they may send, too.
 */
static int look_up(void *unused)
{
	(void)unused;
	return -EINTR;
}

/* The descriptor of a file whose bytes are the descriptor's, or -1. */
static int descriptor_of(PyObject *file)
{
	PyObject *raw = file;
	int fd = -1;

	if ((PyObject *)Py_TYPE(file) == buffered_reader)
		raw = PyObject_GetAttr(file, name_raw);
	else
		Py_INCREF(raw);
	if (raw && (PyObject *)Py_TYPE(raw) == file_io)
		fd = PyObject_AsFileDescriptor(raw);
	Py_XDECREF(raw);
	PyErr_Clear();
	return fd;
}

/* A whole number from 0 up, or -1. */
static long long whole(PyObject *number)
{
	long long value = -1;

	if (PyLong_CheckExact(number))
		value = PyLong_AsLongLong(number);
	PyErr_Clear();
	return value < 0 ? -1 : value;
}

/*
 * sendfile(2) has no MSG_DONTWAIT, and waiting is not for the kernel: before
 * 6.1.183, 6.12.104 and 7.2 a signal to a thread that waits there aborts the
 * connection. So the descriptor doesn't block from here on.
 */
static void never_wait(struct lane *lane)
{
	int on = 1;

	if (lane->nonblocking)
		return;
	lane->nonblocking = 1; /* before: who makes it block takes it away */
	ioctl(lane->fd, FIONBIO, &on);
}

/*
 * ktls_sendfile() for who holds the lock, without the GIL, up to the first short
 * call: -EINTR. All is counted when it returns.
 */
static int send_part(struct lane *lane, int fd, int source, uint64_t offset,
		     uint64_t count, uint64_t *sent)
{
	int error =
		ktls_sendfile(fd, source, offset, count, sent, look_up, NULL);

	if (*sent)
		lane->used += records(lane, *sent);
	lane->sent += *sent;
	return error;
}

/*
 * A FileIO, if nobody has closed it, is its descriptor; any other file knows more
 * than where that is.
 */
static int move_position(PyObject *file, int source, long long position)
{
	PyObject *number, *done = NULL;

	if ((PyObject *)Py_TYPE(file) == file_io &&
	    descriptor_of(file) == source &&
	    lseek(source, position, SEEK_SET) == position)
		return 0;
	number = PyLong_FromLongLong(position);
	if (number)
		done = PyObject_CallMethodOneArg(file, name_seek, number);
	Py_XDECREF(number);
	Py_XDECREF(done);
	return done ? 0 : -1;
}

/* A sendfile of a Socket, its owner. */
struct file_send {
	PyObject *owner, *file;
	int source;
	uint64_t offset, count, sent;
	double timeout; /* of the owner, in seconds; negative: none */
	double end; /* of waiting; 0: it didn't begin since the last progress */
};

/*
 * The owner's timeout, which another thread may set meanwhile: then it begins
 * anew. -EINTR: an exception is set.
 */
static int look_at_timeout(struct file_send *send)
{
	PyObject *timeout =
		PyObject_CallMethodNoArgs(send->owner, name_gettimeout);
	double seconds = -1;

	if (timeout && timeout != Py_None)
		seconds = PyFloat_AsDouble(timeout);
	Py_XDECREF(timeout);
	if (PyErr_Occurred())
		return -EINTR;
	if (!send->end || seconds != send->timeout) {
		send->timeout = seconds;
		send->end = now() + seconds;
	}
	return 0;
}

/*
 * Waits for room; nobody has the lock meanwhile, so that others get in between.
 * 0: look again; -EAGAIN: the socket doesn't wait, or its timeout ran out;
 * -EINTR: an exception is set.
 */
static int wait_for_room(const struct lane *lane, struct file_send *send)
{
	struct pollfd room = { .fd = lane->fd, .events = POLLOUT };
	int error = look_at_timeout(send), most = PUSH_AGAIN;

	if (error)
		return error;
	if (send->timeout >= 0) {
		double left = send->end - now();

		if (left <= 0)
			return -EAGAIN;
		if (left * 1000 < most)
			most = (int)(left * 1000) + 1;
	}
	Py_BEGIN_ALLOW_THREADS;
	error = poll(&room, 1, most) < 0 ? -errno : 0;
	Py_END_ALLOW_THREADS;
	if (PyErr_CheckSignals())
		return -EINTR;
	return error == -EINTR ? 0 : error;
}

/*
 * Sends for as long as there is nothing to think about. 0: all of it, or the
 * file has ended; -EINTR: there is, or an exception is set; the others as above.
 */
static int send_all(struct lane *lane, struct file_send *send)
{
	for (;;) {
		uint64_t left = send->count - send->sent, most, sent = 0;
		int error = 0;

		if (!enter(lane))
			return -EINTR;
		Py_BEGIN_ALLOW_THREADS;
		most = most_of(lane, left);
		if (most) {
			never_wait(lane);
			error = send_part(lane, lane->fd, send->source,
					  send->offset + send->sent, most,
					  &sent);
		}
		Py_END_ALLOW_THREADS;
		leave(lane);
		send->sent += sent;
		if (sent)
			send->end = 0;
		if (!most || (error == -EINTR && PyErr_CheckSignals()))
			return -EINTR;
		if (!error && (sent < most || sent == left))
			return 0;
		if (error == -EAGAIN)
			error = wait_for_room(lane, send);
		if (error && (error != -EINTR || PyErr_Occurred()))
			return error;
	}
}

/*
 * Leaves to the owner what stopped it, and how many seconds of the timeout are
 * left: None if it didn't begin, or there is none.
 */
static PyObject *ask_owner(const struct file_send *send, PyObject *offset,
			   PyObject *count, PyObject *sent, int error)
{
	double left = send->end - now();
	PyObject *number = PyLong_FromLong(-error), *result = NULL;
	PyObject *seconds = send->end && send->timeout >= 0
				    ? PyFloat_FromDouble(left > 0 ? left : 0)
				    : Py_NewRef(Py_None);

	if (number && seconds)
		result = PyObject_CallMethodObjArgs(
			send->owner, name_after_file, send->file, offset, count,
			sent, number, seconds, NULL);
	Py_XDECREF(number);
	Py_XDECREF(seconds);
	return result;
}

/* Moves the file after what was sent of it, whatever ended that, and tells. */
static PyObject *sent_from(struct lane *lane, const struct file_send *send,
			   PyObject *offset, PyObject *count, int error)
{
	PyObject *type, *value, *traceback, *sent, *result;

	PyErr_Fetch(&type, &value, &traceback);
	if (move_position(send->file, send->source,
			  (long long)(send->offset + send->sent))) {
		Py_XDECREF(type);
		Py_XDECREF(value);
		Py_XDECREF(traceback);
		return NULL;
	}
	if (type) { /* a signal's handler raised it */
		PyErr_Restore(type, value, traceback);
		return NULL;
	}
	sent = PyLong_FromUnsignedLongLong(send->sent);
	if (!sent || (!error && !lane->attention))
		return sent;
	result = ask_owner(send, offset, count, sent, error);
	Py_DECREF(sent);
	return result;
}

PyObject *ktls_lane_sendfile(PyObject *object, PyObject *owner, PyObject *file,
			     PyObject *offset, PyObject *count)
{
	struct lane *lane = (struct lane *)object;
	struct file_send send = { .owner = owner, .file = file };
	long long from, most;
	int error;

	if (lane->attention)
		Py_RETURN_NONE;
	send.source = descriptor_of(file);
	from = whole(offset);
	most = count == Py_None ? LLONG_MAX : whole(count);
	if (send.source < 0 || from < 0 || most <= 0)
		Py_RETURN_NONE;
	send.offset = (uint64_t)from;
	send.count = (uint64_t)most;
	error = send_all(lane, &send);
	/*
	 * Of a pipe and of /proc's files the size doesn't tell what they have:
	 * so nothing to send isn't the last word. Nor is a socket that is full,
	 * or something to think about, before any waiting.
	 */
	if (!send.sent && !PyErr_Occurred() &&
	    (!error || ((error == -EAGAIN || error == -EINTR) &&
			(!send.end || send.timeout <= 0))))
		Py_RETURN_NONE;
	return sent_from(lane, &send, offset, count, error);
}

int ktls_is_lane(PyObject *object)
{
	return Py_IS_TYPE(object, lane_type);
}

PyDoc_STRVAR(sendfile_doc, "sendfile($self, owner, file, offset, count, /)\n"
			   "--\n\n"
			   "Sends a file, if there is nothing to think about.");

static PyObject *lane_sendfile(PyObject *object, PyObject *const *args,
			       Py_ssize_t given)
{
	if (given != 4) {
		PyErr_SetString(PyExc_TypeError, "sendfile takes 4 arguments");
		return NULL;
	}
	return ktls_lane_sendfile(object, args[0], args[1], args[2], args[3]);
}

PyDoc_STRVAR(send_part_doc,
	     "send_part($self, fd, file, offset, count, /)\n--\n\n"
	     "Sends from a file's descriptor, for who holds the lock.");

/*
 * The offset after what was sent, and the errno: EINTR after a short call. fd is
 * given, because the lane may be shut meanwhile.
 */
static PyObject *lane_send_part(PyObject *object, PyObject *args)
{
	struct lane *lane = (struct lane *)object;
	long long offset, count;
	int fd, source, error;
	uint64_t sent;

	if (!PyArg_ParseTuple(args, "iiLL", &fd, &source, &offset, &count))
		return NULL;
	if (offset < 0 || count < 0) {
		PyErr_SetString(PyExc_ValueError,
				"offset and count must not be negative");
		return NULL;
	}
	Py_BEGIN_ALLOW_THREADS;
	error = send_part(lane, fd, source, (uint64_t)offset, (uint64_t)count,
			  &sent);
	Py_END_ALLOW_THREADS;
	return Py_BuildValue("(Ki)", (unsigned long long)offset + sent, -error);
}

PyDoc_STRVAR(send_doc, "send($self, data, flags, /)\n--\n\n"
		       "Sends data, if there is nothing to think about.");

static PyObject *lane_send(PyObject *object, PyObject *const *args,
			   Py_ssize_t given)
{
	struct lane *lane = (struct lane *)object;
	Py_buffer view;
	ssize_t sent = -EAGAIN;
	long flags;

	if (given != 2) {
		PyErr_SetString(PyExc_TypeError, "send takes 2 arguments");
		return NULL;
	}
	if (lane->attention)
		Py_RETURN_NONE;
	flags = PyLong_AsLong(args[1]);
	if (flags == -1 && PyErr_Occurred())
		return NULL;
	if (flags != (int)flags)
		Py_RETURN_NONE;
	if (PyObject_GetBuffer(args[0], &view, PyBUF_SIMPLE)) {
		PyErr_Clear();
		Py_RETURN_NONE;
	}
	if (!enter(lane)) {
		PyBuffer_Release(&view);
		Py_RETURN_NONE;
	}
	if (fits(lane, (uint64_t)view.len)) {
		lane->used += records(lane, (uint64_t)view.len);
		Py_BEGIN_ALLOW_THREADS;
		sent = send(lane->fd, view.buf, (size_t)view.len,
			    (int)flags | MSG_DONTWAIT | MSG_NOSIGNAL);
		if (sent < 0)
			sent = -errno;
		else
			lane->sent += (unsigned long long)sent;
		Py_END_ALLOW_THREADS;
	}
	leave(lane);
	PyBuffer_Release(&view);
	if (sent == -EAGAIN || sent == -EINTR)
		Py_RETURN_NONE; /* nothing was sent: waiting takes thought */
	return PyLong_FromSsize_t(sent);
}

/*
 * Waits for the lock, at most a second: the only clock that every C library takes
 * for it may be set meanwhile. 0: the lock is taken; ETIMEDOUT or EINTR.
 */
static int wait_for_turn(struct lane *lane, double seconds)
{
	struct timespec end;
	int error;

	clock_gettime(CLOCK_REALTIME, &end);
	end.tv_nsec += seconds < 1 ? (long)(seconds * 1e9) : 1000000000;
	end.tv_sec += end.tv_nsec / 1000000000;
	end.tv_nsec %= 1000000000;
	Py_BEGIN_ALLOW_THREADS;
	error = sem_timedwait(&lane->turn, &end) ? errno : 0;
	Py_END_ALLOW_THREADS;
	if (!error)
		take(lane);
	return error;
}

PyDoc_STRVAR(
	acquire_doc,
	"acquire($self, /, blocking=True, timeout=-1)\n--\n\n"
	"As that of threading.Lock: whoever has it may send. Who would wait\n"
	"for ever raises: a signal's handler for the thread it interrupts, a\n"
	"process for a thread of the one that it was forked from.");

/* Whether nobody will ever give the lock back; then an exception is set. */
static int is_stuck(const struct lane *lane)
{
	if (!lane->locked)
		return 0;
	if (lane->owner == PyThread_get_thread_ident())
		PyErr_SetString(PyExc_RuntimeError,
				"a signal's handler can't send on the socket "
				"whose send it interrupts");
	else if (lane->forks != forks)
		PyErr_SetString(PyExc_RuntimeError,
				"a thread of the parent process was sending on "
				"this socket when it forked");
	else
		return 0;
	return 1;
}

static PyObject *lane_acquire(PyObject *object, PyObject *args,
			      PyObject *keywords)
{
	static char *names[] = { "blocking", "timeout", NULL };
	struct lane *lane = (struct lane *)object;
	double timeout = -1, end;
	int blocking = 1;

	if (!PyArg_ParseTupleAndKeywords(args, keywords, "|pd", names,
					 &blocking, &timeout))
		return NULL;
	if (try_to_take(lane))
		Py_RETURN_TRUE;
	if (!blocking)
		Py_RETURN_FALSE;
	if (timeout < 0 && is_stuck(lane))
		return NULL;
	end = now() + timeout;
	for (;;) {
		double left = timeout < 0 ? 1 : end - now();
		int error;

		if (left <= 0)
			Py_RETURN_FALSE;
		error = wait_for_turn(lane, left);
		if (!error)
			Py_RETURN_TRUE;
		if (error == EINTR && PyErr_CheckSignals())
			return NULL;
	}
}

PyDoc_STRVAR(release_doc, "release($self, /)\n--\n\n"
			  "As that of threading.Lock.");

static PyObject *lane_release(PyObject *object, PyObject *unused)
{
	struct lane *lane = (struct lane *)object;

	(void)unused;
	if (!lane->locked) {
		PyErr_SetString(PyExc_RuntimeError, "release unlocked lock");
		return NULL;
	}
	leave(lane);
	Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
	{ "acquire", (PyCFunction)(void (*)(void))lane_acquire,
	  METH_VARARGS | METH_KEYWORDS, acquire_doc },
	{ "release", lane_release, METH_NOARGS, release_doc },
	{ "__enter__", (PyCFunction)(void (*)(void))lane_acquire,
	  METH_VARARGS | METH_KEYWORDS, acquire_doc },
	{ "__exit__", lane_release, METH_VARARGS, release_doc },
	{ "sendfile", (PyCFunction)(void (*)(void))lane_sendfile, METH_FASTCALL,
	  sendfile_doc },
	{ "send_part", lane_send_part, METH_VARARGS, send_part_doc },
	{ "send", (PyCFunction)(void (*)(void))lane_send, METH_FASTCALL,
	  send_doc },
	{ NULL, NULL, 0, NULL },
};

static PyMemberDef members[] = {
	{ "fd", T_INT, offsetof(struct lane, fd), 0, NULL },
	{ "attention", T_BOOL, offsetof(struct lane, attention), 0, NULL },
	{ "nonblocking", T_BOOL, offsetof(struct lane, nonblocking), 0, NULL },
	{ "used", T_ULONGLONG, offsetof(struct lane, used), 0, NULL },
	{ "sent", T_ULONGLONG, offsetof(struct lane, sent), 0, NULL },
	{ "limit", T_ULONGLONG, offsetof(struct lane, limit), READONLY, NULL },
	{ NULL, 0, 0, 0, NULL },
};

static PyType_Slot slots[] = {
	{ Py_tp_doc, "The way of sends that there is nothing to think about." },
	{ Py_tp_new, lane_new },
	{ Py_tp_init, lane_init },
	{ Py_tp_dealloc, lane_dealloc },
	{ Py_tp_methods, methods },
	{ Py_tp_members, members },
	{ 0, NULL },
};

static PyType_Spec spec = {
	.name = "ktls._ktls.Lane",
	.basicsize = sizeof(struct lane),
	.flags = Py_TPFLAGS_DEFAULT,
	.slots = slots,
};

PyObject *ktls_lane_type(void)
{
	PyObject *io;

	if (pthread_atfork(NULL, NULL, forked))
		return PyErr_NoMemory();
	io = PyImport_ImportModule("_io");
	if (!io)
		return NULL;
	buffered_reader = PyObject_GetAttrString(io, "BufferedReader");
	file_io = PyObject_GetAttrString(io, "FileIO");
	name_raw = PyUnicode_InternFromString("raw");
	name_seek = PyUnicode_InternFromString("seek");
	name_gettimeout = PyUnicode_InternFromString("gettimeout");
	name_after_file = PyUnicode_InternFromString("_after_file");
	Py_DECREF(io);
	if (!buffered_reader || !file_io || !name_raw || !name_seek ||
	    !name_gettimeout || !name_after_file)
		return NULL;
	lane_type = (PyTypeObject *)PyType_FromSpec(&spec);
	return Py_XNewRef((PyObject *)lane_type);
}
