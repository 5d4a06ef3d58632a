// SPDX-License-Identifier: MIT
/*
 * ktls._ktls.Lane: what a send costs when there is nothing to think about
 *
 * A KernelSender (ktls/sending.py) has to look after keys, records that are
 * owed to the peer, other threads, errors that stay. Most sends meet none of
 * that, and what it takes to see so in Python is more than the system call.
 * This sees it in C: either it does the whole send, or it does nothing and
 * returns None, and Python takes its time.
 *
 * What there is to think about is told by `attention`, which anyone may set at
 * any time, and who holds the lock takes away. `used` and `limit` count the
 * records that a key has protected, and may; `sent` the bytes that the kernel
 * took, here and by the sender, for ktls/tally.py.
 */
#define PY_SSIZE_T_CLEAN
#define _FILE_OFFSET_BITS 64
#include <Python.h>
#include <structmember.h>

#include <errno.h>
#include <limits.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include "_lane.h"
#include "ktls.h"

#define MOST_AT_ONCE (1ULL << 33) /* of a file, if its size is unknown */

struct lane {
	PyObject_HEAD int fd;
	char attention;
	char nonblocking; /* the descriptor is, whatever the socket's timeout */
	unsigned int max_fragment;
	unsigned long long used, limit, sent;
	PyObject *acquire, *release; /* of the lock */
};

/* Of the io module; kept for as long as the process lives. */
static PyObject *buffered_reader, *file_io, *name_raw, *name_seek;

static int lane_init(PyObject *object, PyObject *args, PyObject *keywords)
{
	static char *names[] = { "fd",   "lock",  "max_fragment",
				 "used", "limit", NULL };
	struct lane *lane = (struct lane *)object;
	unsigned int max_fragment;
	PyObject *lock;

	if (!PyArg_ParseTupleAndKeywords(args, keywords, "iOIKK", names,
					 &lane->fd, &lock, &max_fragment,
					 &lane->used, &lane->limit))
		return -1;
	if (!max_fragment) {
		PyErr_SetString(PyExc_ValueError, "max_fragment must not be 0");
		return -1;
	}
	lane->max_fragment = max_fragment;
	Py_XSETREF(lane->acquire, PyObject_GetAttrString(lock, "acquire"));
	Py_XSETREF(lane->release, PyObject_GetAttrString(lock, "release"));
	return lane->acquire && lane->release ? 0 : -1;
}

static void lane_dealloc(PyObject *object)
{
	struct lane *lane = (struct lane *)object;
	PyTypeObject *type = Py_TYPE(object);

	Py_CLEAR(lane->acquire);
	Py_CLEAR(lane->release);
	type->tp_free(object);
	Py_DECREF(type);
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
 * How much of so many bytes of a file a call may send, without asking how long
 * it is; 0 near the end of what the key may protect. For who holds the lock.
 */
static uint64_t most_of(const struct lane *lane, uint64_t count)
{
	return fits(lane, count)          ? count
	       : fits(lane, MOST_AT_ONCE) ? MOST_AT_ONCE
					  : 0;
}

/*
 * Takes the lock if there is nothing to think about. 0: there is, or others
 * are sending; -1: an exception.
 */
static int enter(struct lane *lane)
{
	PyObject *got;
	int held;

	if (lane->attention || lane->fd < 0 || !lane->acquire)
		return 0;
	got = PyObject_CallOneArg(lane->acquire, Py_False);
	if (!got)
		return -1;
	held = got == Py_True;
	Py_DECREF(got);
	if (!held || (!lane->attention && lane->fd >= 0))
		return held;
	got = PyObject_CallNoArgs(lane->release);
	if (!got)
		return -1;
	Py_DECREF(got);
	return 0;
}

/* Gives the lock back; an exception that is set stays set. */
static int leave(struct lane *lane)
{
	PyObject *type, *value, *traceback, *done;

	PyErr_Fetch(&type, &value, &traceback);
	done = PyObject_CallNoArgs(lane->release);
	if (done && type)
		PyErr_Restore(type, value, traceback);
	Py_XDECREF(done);
	return done ? 0 : -1;
}

/* Signal handlers may raise: that ends a sendfile. */
static int check_signals(void *unused)
{
	PyGILState_STATE state = PyGILState_Ensure();
	int raised = PyErr_CheckSignals();

	(void)unused;
	PyGILState_Release(state);
	return raised ? -EINTR : 0;
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
 * ktls_sendfile() for who holds the lock, without the GIL. All is counted when
 * it returns, and an exception of a signal's handler is set.
 */
static int send_part(struct lane *lane, int fd, int source, uint64_t offset,
		     uint64_t count, uint64_t *sent)
{
	int error = ktls_sendfile(fd, source, offset, count, sent,
				  check_signals, NULL);

	if (*sent)
		lane->used += records(lane, *sent);
	lane->sent += *sent;
	return error;
}

static int move_position(PyObject *file, long long position)
{
	PyObject *number = PyLong_FromLongLong(position), *done = NULL;

	if (number)
		done = PyObject_CallMethodOneArg(file, name_seek, number);
	Py_XDECREF(number);
	Py_XDECREF(done);
	return done ? 0 : -1;
}

/* Moves the file after what was sent of it, whatever ended that, and tells. */
static PyObject *sent_from(struct lane *lane, PyObject *file, long long offset,
			   uint64_t sent, int error)
{
	PyObject *type, *value, *traceback;

	PyErr_Fetch(&type, &value, &traceback);
	if (move_position(file, offset + (long long)sent)) {
		Py_XDECREF(type);
		Py_XDECREF(value);
		Py_XDECREF(traceback);
		return NULL;
	}
	if (type) { /* a signal's handler raised it */
		PyErr_Restore(type, value, traceback);
		return NULL;
	}
	if (!error && !lane->attention)
		return PyLong_FromUnsignedLongLong(sent);
	return Py_BuildValue("(Ki)", (unsigned long long)sent, -error);
}

PyDoc_STRVAR(sendfile_doc, "sendfile($self, file, offset, count, /)\n--\n\n"
			   "Sends a file, if there is nothing to think about.");

static PyObject *lane_sendfile(PyObject *object, PyObject *const *args,
			       Py_ssize_t given)
{
	struct lane *lane = (struct lane *)object;
	long long offset, count;
	uint64_t most, sent = 0;
	int source, entered, error = 0;

	if (given != 3) {
		PyErr_SetString(PyExc_TypeError, "sendfile takes 3 arguments");
		return NULL;
	}
	if (lane->attention)
		Py_RETURN_NONE;
	source = descriptor_of(args[0]);
	offset = whole(args[1]);
	count = args[2] == Py_None ? LLONG_MAX : whole(args[2]);
	if (source < 0 || offset < 0 || count <= 0)
		Py_RETURN_NONE;
	entered = enter(lane);
	if (entered <= 0)
		return entered ? NULL : Py_NewRef(Py_None);
	Py_BEGIN_ALLOW_THREADS;
	most = most_of(lane, (uint64_t)count);
	if (most) {
		never_wait(lane);
		error = send_part(lane, lane->fd, source, (uint64_t)offset,
				  most, &sent);
		if (!error && sent == most && most < (uint64_t)count)
			error = -EAGAIN; /* there may be more */
	}
	Py_END_ALLOW_THREADS;
	if (leave(lane))
		return NULL;
	/*
	 * Of a pipe and of /proc's files the size doesn't tell what they have:
	 * so nothing to send isn't the last word, nor is a socket that is full.
	 */
	if (!sent && (!error || error == -EAGAIN))
		Py_RETURN_NONE;
	return sent_from(lane, args[0], offset, sent, error);
}

PyDoc_STRVAR(send_part_doc,
	     "send_part($self, fd, file, offset, count, /)\n--\n\n"
	     "Sends from a file's descriptor, for who holds the lock.");

/*
 * The offset after what was sent, the errno and what a signal's handler raised
 * come side by side: none hides another. fd is given, because the lane may be
 * shut meanwhile.
 */
static PyObject *lane_send_part(PyObject *object, PyObject *args)
{
	struct lane *lane = (struct lane *)object;
	PyObject *type, *raised, *traceback, *outcome;
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
	PyErr_Fetch(&type, &raised, &traceback);
	PyErr_NormalizeException(&type, &raised, &traceback);
	if (traceback)
		PyException_SetTraceback(raised, traceback);
	outcome = Py_BuildValue("(KiO)", (unsigned long long)offset + sent,
				-error, raised ? raised : Py_None);
	Py_XDECREF(type);
	Py_XDECREF(raised);
	Py_XDECREF(traceback);
	return outcome;
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
	int entered;

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
	entered = enter(lane);
	if (entered <= 0) {
		PyBuffer_Release(&view);
		return entered ? NULL : Py_NewRef(Py_None);
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
	entered = leave(lane);
	PyBuffer_Release(&view);
	if (entered)
		return NULL;
	if (sent == -EAGAIN || sent == -EINTR)
		Py_RETURN_NONE; /* nothing was sent: waiting takes thought */
	return PyLong_FromSsize_t(sent);
}

static PyMethodDef methods[] = {
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
	{ Py_tp_new, PyType_GenericNew },
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
	PyObject *io = PyImport_ImportModule("_io");

	if (!io)
		return NULL;
	buffered_reader = PyObject_GetAttrString(io, "BufferedReader");
	file_io = PyObject_GetAttrString(io, "FileIO");
	name_raw = PyUnicode_InternFromString("raw");
	name_seek = PyUnicode_InternFromString("seek");
	Py_DECREF(io);
	if (!buffered_reader || !file_io || !name_raw || !name_seek)
		return NULL;
	return PyType_FromSpec(&spec);
}
